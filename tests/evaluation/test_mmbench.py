import math
import sys

import pytest
from eval_fixtures import asked, golden, lay_out, lines, published_rows, run_of, stripped, user_texts, without

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Answered, Run
from lmm_jax.evaluation.choice import MMBENCH, MMBENCH_AS_PUBLISHED, MMBENCH_CN

DEV = "mmbench_dev_20230712.tsv"


@pytest.fixture
def mmbench(tmp_path):
    return run_of(MMBENCH_AS_PUBLISHED, lay_out(tmp_path, "mmbench"), lines("mmbench/answers.jsonl"))


@pytest.fixture
def mmbench_cn(tmp_path):
    return run_of(MMBENCH_CN, lay_out(tmp_path, "mmbench_cn"), lines("mmbench_cn/answers.jsonl"))


# ---- what is asked, and what is written down


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbenchs_prompts(request, name):
    run, expected = request.getfixturevalue(name), golden(f"{name}/expected.json")
    benchmark = {"mmbench": MMBENCH_AS_PUBLISHED, "mmbench_cn": MMBENCH_CN}[name]
    assert asked([a.record for a in run.answers]) == user_texts(expected["full_prompts"])
    assert published_rows(run, benchmark) == stripped(lines(f"{name}/answers.jsonl"))
    assert benchmark.max_new_tokens == expected["generate_arguments"]["max_new_tokens"]


def test_mmbenchs_pictures_are_in_the_table(mmbench):
    (image,) = mmbench.answers[0].record.images
    assert image.startswith(b"\x89PNG") and len(image) == 69


def test_an_option_may_be_none(mmbench):
    """Only an empty cell ends the options; pandas takes None, NA and nan for one (evaluation spec section 7, T12)."""
    ours, published = MMBENCH.records(mmbench.folder), MMBENCH_AS_PUBLISHED.records(mmbench.folder)
    assert [key for key in range(8) if ours[key] != published[key]] == [6]
    assert ours[6].row["options"] == ["1", "2", "None", "4"] and ours[6].row["option_char"] == list("ABCD")
    assert ours[6].text.startswith("How many?\nA. 1\nB. 2\nC. None\nD. 4\n")
    assert ours[7].text.startswith("Which?")  # a hint that reads nan is none either way


@pytest.mark.parametrize("cell", ["none", "NaN", "NA", "null", "<NA>", "#N/A"])
def test_cells_that_the_published_script_takes_for_empty(mmbench, cell):
    file = mmbench.folder / DEV
    file.write_text(file.read_text().replace("\ta cup\t", f"\t{cell}\t"))
    assert MMBENCH.records(mmbench.folder)[0].row["options"] == ["a tin", cell, "a bag", "a box"]
    assert MMBENCH_AS_PUBLISHED.records(mmbench.folder)[0].row["options"] == ["a tin"]


# ---- figures and what is handed in


def cells(file):
    """The rows of an Excel file."""
    import openpyxl

    return [list(row) for row in openpyxl.load_workbook(file).active.iter_rows(values_only=True)]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench(request, name, tmp_path):
    run, expected = request.getfixturevalue(name), golden(f"{name}/expected.json")
    benchmark = {"mmbench": MMBENCH_AS_PUBLISHED, "mmbench_cn": MMBENCH_CN}[name]
    score = benchmark.score(run)
    circular = next(value for name, value in expected.items() if name.startswith("circular_accuracy"))
    assert score.figures == {"circular": 100 * circular, "rows": 100 * expected["row_accuracy"]}
    assert score.headline == 100 * circular
    found = {}
    for a, right in zip(run.answers, score.right):
        question = str(a.record.row["question_id"] % 1_000_000)
        found[question] = bool(right) and found.get(question, True)
    assert found == expected["circular_per_question"]
    (file,) = benchmark.export(run, tmp_path)
    assert cells(file) == [expected["xlsx_columns"], *expected["xlsx_rows"]]


def test_mmbench_with_cells_as_they_are(mmbench, tmp_path):
    rows = [row for row in lines("mmbench/answers.jsonl")]
    run, expected = run_of(MMBENCH, mmbench.folder, rows), golden("mmbench/expected.json")
    assert MMBENCH.score(run) == MMBENCH_AS_PUBLISHED.score(mmbench)
    (file,) = MMBENCH.export(run, tmp_path)
    expected["xlsx_rows"][6][4] = "None"
    assert cells(file) == [expected["xlsx_columns"], *expected["xlsx_rows"]]


def test_mmbench_without_an_answer(mmbench, tmp_path):
    score = MMBENCH.score(without(mmbench, 2, fault="broken picture"))
    assert score.figures == {"circular": 25, "rows": 62.5}
    assert score.notes == ["1 replies are not just a letter and count as wrong, though the server may read them otherwise"]
    (file,) = MMBENCH.export(without(mmbench, 2), tmp_path)
    assert cells(file)[3][6] is None


def test_rotations_are_found_whatever_their_order(mmbench):
    assert MMBENCH.score(Run(mmbench.folder, mmbench.answers[::-1])).figures == MMBENCH.score(mmbench).figures


def test_a_reply_is_never_a_formula(mmbench, tmp_path):
    import openpyxl

    replies = ["=1+1", "#N/A", "a\x00b\x0bc", "2", "x\ud800", "True", "\n", "好"]
    run = Run(mmbench.folder, [Answered(a.record, reply) for a, reply in zip(mmbench.answers, replies)])
    (file,) = MMBENCH.export(run, tmp_path)
    found = [row[6] for row in openpyxl.load_workbook(file).active.iter_rows(min_row=2)]
    assert [cell.value for cell in found] == ["=1+1", "#N/A", "abc", "2", "x?", "True", "\n", "好"]
    assert {cell.data_type for cell in found} == {"s"}


def test_without_openpyxl(mmbench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match="pip install openpyxl"):
        MMBENCH.export(mmbench, tmp_path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("\n2\t", "\n1\t", "row 5 of .* repeats '1'"),
        ("\n2\t", "\ntwo\t", "row 5 of .* no number for an index"),
        ("\n4\tWhich?", "\n4\tWhich?\tmore", "row 8 of .* more cells than the head"),
        ("\tsplit\n", "\tpart\n", "row 1 of .* has no usable split"),
        ("\t\tdev\n2\t", "\n2\t", "row 4 of .* has no usable split"),
        ("\tiVBORw0KGgo", "\tiVBORw0KGg", "the image of row 1 of .* is no base64"),
    ],
)
def test_malformed_tables(mmbench, old, new, message):
    file = mmbench.folder / DEV
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        MMBENCH.records(mmbench.folder)


@pytest.mark.parametrize("answer", ["", "E", "AB"])
def test_a_table_without_answers(mmbench, answer):
    file = mmbench.folder / DEV
    file.write_text(file.read_text().replace("\tB\tmade_up", f"\t{answer}\tmade_up"))
    with pytest.raises(UserError, match="for the answer of row 1: take the dev table"):
        MMBENCH.score(mmbench)


def test_a_table_of_other_questions(mmbench):
    file = mmbench.folder / DEV
    file.write_text(file.read_text().replace("\n4\t", "\n44\t"))
    with pytest.raises(UserError, match="holds no answer to 4"):
        MMBENCH.score(mmbench)


def test_tables_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        MMBENCH.records(tmp_path)
    (tmp_path / DEV).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        MMBENCH.records(tmp_path)


def test_a_cell_may_hold_a_large_picture(mmbench):
    file = mmbench.folder / DEV
    head, *rows = file.read_text().split("\n")
    file.write_text("\n".join([head, rows[0].replace("\tiVBOR", "\t" + "A" * 400_000 + "iVBOR"), *rows[1:]]))
    assert len(MMBENCH.records(mmbench.folder)[0].images[0]) > 300_000


def test_line_ends_of_windows(mmbench):
    """Of rows they end the row; within a cell they stay, as pandas leaves them."""
    file = mmbench.folder / DEV
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    records = MMBENCH.records(mmbench.folder)
    assert len(records) == 8 and records[4].text.startswith("Is it on?\r\nChoose.\nA. yes\nB. no\n")
    assert math.isclose(MMBENCH.score(mmbench).headline, 50)

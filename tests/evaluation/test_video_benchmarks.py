"""MVBench, MLVU and EgoSchema; also what each video benchmark asks."""

import json
import shutil
import statistics

import pytest
from eval_fixtures import belongs
from evaluation.judging import FIXTURES, named, read, read_rows, run_of, write

from lmm_jax.errors import UserError
from lmm_jax.evaluation import video
from lmm_jax.evaluation.benchmark import Answered, Run
from lmm_jax.evaluation.parsing import first_capital, strict_letter
from lmm_jax.evaluation.wording import load

MVBENCH, MLVU, EGOSCHEMA = (named(video.BENCHMARKS, name) for name in ("mvbench", "mlvu", "egoschema"))
TASKED = [MVBENCH, MLVU]
STRICT, LENIENT = (
    "strict (the number the reference reports)",
    "lenient (mean of the per-record field acc, macro-averaged)",
)


def fixture(benchmark):
    folder = FIXTURES / benchmark.name
    return folder, read(folder / "expected.json")


def renamed(path, folder):
    return path.replace(str(folder), "DATA_DIR")


# ---- parsers


@pytest.mark.parametrize("case", read(FIXTURES / "option_parsing" / "expected.json"))
def test_option_parsing(case):
    reply = case["reply"]
    assert (strict_letter(reply) == "B") == case["strict_check_vs_(B) cup"]
    assert first_capital(reply, 4) == case["first_letter_of_4 (default A)"]
    assert first_capital(reply, 2) == case["first_letter_of_2 (default A)"]
    assert video._egoschema_choice(reply) == case["egoschema_index (default -1)"]


# ---- MVBench and MLVU


@pytest.mark.parametrize("benchmark", TASKED, ids=lambda b: b.name)
def test_records_rows_and_figures(benchmark):
    folder, expected = fixture(benchmark)
    replies = expected["replies_in_record_order"]
    run = run_of(benchmark, folder, replies)
    assert len(run.answers) == expected["record_count"]
    assert [renamed(a.record.video, folder) for a in run.answers] == expected["video_paths_in_record_order"]

    rows = [benchmark.answer_row(a.record, a.reply) for a in run.answers]
    published = read_rows(folder / "expected_answers.jsonl")
    assert [json.dumps(row | {"video": renamed(row["video"], folder)}) for row in rows] == list(map(json.dumps, published))
    assert [benchmark.reply_of(row) for row in published] == replies
    assert all(belongs(benchmark, a.record, row) for a, row in zip(run.answers, published))
    assert not any(belongs(benchmark, a.record, row) for a, row in zip(run.answers, published[1:]))

    score = benchmark.score(run)
    assert score.notes == []
    for name, key in (("accuracy", STRICT), ("accuracy by first capital", LENIENT)):
        for task, figure in expected[key].items():
            found = score.figures[name if task == "Avg" else f"{name} / {task}"]
            assert found == pytest.approx(figure, rel=1e-15), (name, task)
    assert score.headline == pytest.approx(expected[STRICT]["Avg"], rel=1e-15)
    counts = {}
    for a, hit in zip(run.answers, score.right):
        right, total = counts.get(a.record.row["question_type"], (0, 0))
        counts[a.record.row["question_type"]] = (right + int(hit), total + 1)
    assert {task: list(count) for task, count in counts.items()} == expected["strict_counts_correct_total"]


@pytest.mark.parametrize("benchmark", TASKED, ids=lambda b: b.name)
def test_a_video_that_is_not_there_is_wrong_by_either_reading(benchmark):
    """T10: the published scripts answer N/A, and so A, by the lenient reading."""
    folder, _ = fixture(benchmark)
    records = benchmark.records(folder)
    answers = [Answered(r, "N/A", "no such file") for r in records]
    score = benchmark.score(Run(folder, answers))
    assert set(score.figures.values()) == {0.0} and set(score.right) == {0.0}
    gold = [Answered(r, r.letter) for r in records]
    assert benchmark.score(Run(folder, gold)).figures["accuracy by first capital"] == 100
    one_missing = benchmark.score(Run(folder, [Answered(records[0], records[0].letter, "missing"), *gold[1:]]))
    task = records[0].row["question_type"]
    assert one_missing.figures[f"accuracy / {task}"] == one_missing.figures[f"accuracy by first capital / {task}"] == 50
    assert one_missing.headline < 100


def test_published_figures():
    """Plain means of the tasks' figures are those that are published as averages."""
    assert (MVBENCH.published, MLVU.published) == ({"LLaVA-Mini": 44.5}, {"LLaVA-Mini": 42.8})
    assert EGOSCHEMA.published == {"LLaVA-Mini": 51.2}
    assert statistics.fmean(task.published for task in video.MLVU_TASKS) == pytest.approx(42.8, abs=0.05)


def test_tables_of_tasks_are_the_published_ones():
    published = read(FIXTURES / "protocol_constants.json")
    tasks = {t.name: (t.file.removeprefix("json/"), f"{t.videos}/") for t in video.MVBENCH_TASKS}
    assert list(tasks.items()) == [(name, tuple(row[:2])) for name, row in published["mvbench_tasks"].items()]
    tasks = {t.name: (t.file, t.videos) for t in video.MLVU_TASKS}
    assert list(tasks.items()) == [(name, tuple(row[:2])) for name, row in published["mlvu_tasks"].items()]
    assert published["prompts"]["video_multiple_choice_suffix"] == video._SUFFIX


@pytest.fixture
def mlvu(tmp_path):
    return shutil.copytree(FIXTURES / "mlvu", tmp_path / "mlvu")


def set_first(folder, **changes):
    file = folder / "json" / "4_count.json"
    entries = read(file)
    write(file, [entries[0] | changes, *entries[1:]])


def test_an_answer_that_is_no_option_is_never_right(mlvu):
    set_first(mlvu, answer="a jar")
    record = MLVU.records(mlvu)[0]
    assert record.row["gt"] == "(@) a jar"
    for reply in ("@", "(@)", "", ") x", "A"):
        score = MLVU.score(run_of(MLVU, mlvu, [reply] * 20))
        assert score.right[0] == MLVU.answer_row(record, reply)["acc"] == 0
        assert score.figures["accuracy by first capital / count"] == 0
    assert any("not among the options of records 0:" in note for note in score.notes)


def test_options_need_not_be_texts_and_the_last_of_equal_ones_is_right(mlvu):
    set_first(mlvu, candidates=[1, 2, 2, 3], answer=2)
    record = MLVU.records(mlvu)[0]
    assert record.text.endswith("Options:\n(A) 1\n(B) 2\n(C) 2\n(D) 3\nAnswer with one letter.")
    assert (record.letter, record.options, record.row["gt"]) == ("C", 4, "(C) 2")


def test_options_with_letters_in_their_text(mlvu):
    set_first(mlvu, candidates=["x\n(B) y\n(E) z", "w"], answer="w")
    record = MLVU.records(mlvu)[0]
    assert (record.options, record.letter) == (2, "B")
    assert MLVU.answer_row(record, "C) B")["ans"] == "B"


@pytest.mark.parametrize("wrong", [{"candidates": []}, {"candidates": ["x"] * 27}, {"candidates": "abc"}, {"video": None}])
def test_entries_that_are_none(mlvu, wrong):
    set_first(mlvu, **wrong)
    with pytest.raises(UserError, match="4_count.json"):
        MLVU.records(mlvu)


def test_files_that_are_none(mlvu):
    write(mlvu / "json" / "3_ego.json", {"a": 1})
    with pytest.raises(UserError, match="no JSON list"):
        MLVU.records(mlvu)
    (mlvu / "json" / "3_ego.json").unlink()
    with pytest.raises(UserError, match="there is no"):
        MLVU.records(mlvu)


def test_a_task_without_questions_counts_as_0_and_is_told(mlvu):
    write(mlvu / "json" / "5_order.json", [])
    records = MLVU.records(mlvu)
    score = MLVU.score(Run(mlvu, [Answered(r, r.letter) for r in records]))
    assert score.headline == pytest.approx(100 * 6 / 7)
    assert any("accuracy of order divides by zero" in note for note in score.notes)


# ---- EgoSchema


def test_egoschema_rows_figures_and_hand_over(tmp_path):
    folder = FIXTURES / "egoschema"
    expected = read(folder / "expected.json")
    replies = expected["replies_in_order (uid6 has no video file and gets no reply)"]
    run = run_of(EGOSCHEMA, folder, [*replies, None])
    assert run.answers[3].record.video == str(folder / "videos" / "uid3")

    published = read_rows(folder / "expected_answers.jsonl")
    assert len(published) == expected["rows_written"]
    for a, row in zip(run.answers, published):
        ours = EGOSCHEMA.answer_row(a.record, a.reply)
        assert ours["prompt"] == a.record.text
        elided = "(long instruction, see appendix B) " + ours["prompt"][ours["prompt"].index("Choices:") :]
        assert json.dumps(ours | {"prompt": elided}) == json.dumps(row)
        assert EGOSCHEMA.reply_of(row) == a.reply and belongs(EGOSCHEMA, a.record, row)
    assert not belongs(EGOSCHEMA, run.answers[1].record, published[0])

    score = EGOSCHEMA.score(run)
    assert [f"ACC:  {score.headline / 100}"] == expected["scorer_printout"]
    assert score.right == [row["acc"] for row in published] + [0.0]
    (file,) = EGOSCHEMA.export(run, tmp_path)
    handed = expected["submission_format (official server; built by hand from the same predictions)"]
    assert list(read(file).items()) == [*handed.items(), ("uid6", -1)]


def test_egoschema_from_the_official_release(tmp_path):
    full = read(FIXTURES / "egoschema" / "mc.json")
    write(tmp_path / "questions.json", [{k: v for k, v in entry.items() if k != "answer"} for entry in full])
    write(tmp_path / "subset_answers.json", {entry["q_uid"]: entry["answer"] for entry in full[:2]})
    run = run_of(EGOSCHEMA, tmp_path, ["A", "A", "C", "D", "E", "A", "A"])
    score = EGOSCHEMA.score(run)
    assert score.right == [1.0, 0.0, None, None, None, None, None]
    assert score.headline == 50 and "answers to 5 questions" in score.notes[0]
    rows = [EGOSCHEMA.answer_row(a.record, a.reply) for a in run.answers]
    assert [row.get("acc") for row in rows[:3]] == [1, 0, None]
    (file,) = EGOSCHEMA.export(run, tmp_path)
    assert list(read(file).values()) == [0, 0, 2, 3, 4, 0, 0]
    write(tmp_path / "subset_answers.json", {})
    assert EGOSCHEMA.score(run_of(EGOSCHEMA, tmp_path, ["A"] * 7)).headline == 0


@pytest.mark.parametrize("wrong", [{"answer": 5}, {"answer": "A"}, {"option 4": None}, {"q_uid": "uid1"}])
def test_egoschema_entries_that_are_none(tmp_path, wrong):
    entries = read(FIXTURES / "egoschema" / "mc.json")
    write(tmp_path / "mc.json", [entries[0] | wrong, *entries[1:]])
    with pytest.raises(UserError, match="of .*mc.json|repeats"):
        EGOSCHEMA.records(tmp_path)


# ---- prompts


PROMPTS = read(FIXTURES / "prompts" / "video_prompts.json")


@pytest.mark.parametrize("benchmark", TASKED, ids=lambda b: b.name)
def test_prompts_with_options(benchmark, tmp_path):
    expected = PROMPTS[benchmark.name]
    tasks = {"mvbench": video.MVBENCH_TASKS, "mlvu": video.MLVU_TASKS}[benchmark.name]
    for task in tasks:
        write(tmp_path / task.file, [{"video": "v", "question": "What?", "candidates": ["x", "y"], "answer": "y"}])
    records = benchmark.records(tmp_path)
    assert len(records) == len(tasks)
    for record in records:
        assert record.row["question"] == expected["question_passed"]
        assert expected["full_prompt"].endswith(f"USER: <image>\n{record.text} ASSISTANT:")
    assert benchmark.max_new_tokens == 1024


def test_prompt_of_egoschema(tmp_path):
    """The published instruction, as far as the fixture shows it, as a user would give it."""
    expected = PROMPTS["egoschema"]
    entry = {"q_uid": "u", "question": "?", "answer": 0}
    write(tmp_path / "mc.json", [entry | {f"option {i}": f"{letter}1" for i, letter in enumerate("abcde")}])
    instruction = "(long instruction, see appendix B) {question}\nChoices:\n{options}\n\nAnswer with one letter."
    write(tmp_path / "words.json", {"name": "given", "egoschema": {"instruction": instruction}})
    for benchmark in (EGOSCHEMA, named(video.benchmarks(load(tmp_path / "words.json")), "egoschema")):
        (record,) = benchmark.records(tmp_path)
        passed = expected["question_passed"].removeprefix("(long instruction, see appendix B) ")
        shown = expected["full_prompt"].removeprefix("(long instruction, see appendix B) ").removesuffix(" ASSISTANT:")
        assert record.text.endswith(passed) and record.text.endswith(shown)
        assert record.row["prompt"] == record.text
    assert benchmark.max_new_tokens == 128

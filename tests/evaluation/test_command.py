"""`lmm eval score | export | table | list`: every fixture's numbers by way of the command line; refusals."""

import json
import re
import subprocess
import sys

import pytest
from eval_fixtures import GOLDEN, Place, answers_of, golden, lines, write_lines

from lmm_jax.evaluation.registry import GROUPS, benchmarks

CIRCULAR = "circular_accuracy (all rotations of index % 1000000 right)"
STRICT = "strict (the number the reference reports)"
LENIENT = "lenient (mean of the per-record field acc, macro-averaged)"


@pytest.fixture
def place(tmp_path, capsys):
    return Place(tmp_path, capsys)


def fixture_of(name):
    return name.removesuffix("_as_published")


# ---- the published numbers


def gqa_figures():
    """Those of the printed lines; the first three are in percent, the distribution is not."""
    printed = dict(line.strip().split(": ") for line in golden("gqa/expected.json")["scorer_printout"] if ": " in line)
    return {
        name.lower(): float(printed[name].split("%")[0].split()[0]) for name in ("Binary", "Open", "Accuracy", "Distribution")
    }


def pope_figures():
    expected = golden("pope/expected.json")
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "F1", "Yes ratio": "yes"}
    found = {}
    for category in ("adversarial", "random", "popular"):
        found |= {f"{ours} / {category}": 100 * expected[category][name] for name, ours in names.items()}
        found |= {f"{name} / {category}": expected[category][name] for name in ("TP", "FP", "TN", "FN")}
    return found | {"mean F1": 100 * next(value for name, value in expected.items() if name.startswith("mean_of"))}


def mme_figures():
    expected = golden("mme/expected.json")
    tasks = {f"score / {task}": figure for task, figure in expected["tasks"].items()}
    return tasks | {"perception": expected["Perception"], "cognition": expected["Cognition"]}


def seed_figures():
    names = {"Total accuracy": "total", "image accuracy": "image", "video accuracy": "video"}
    printed = (line.rsplit(": ", 1) for line in golden("seed/expected.json")["with_missing_109"][:-1])
    return {names.get(name, f"type / {name}"): float(value.rstrip("%")) for name, value in printed}


def mmbench_figures(fixture):
    expected = golden(f"{fixture}/expected.json")
    return {"circular": 100 * expected[CIRCULAR], "rows": 100 * expected["row_accuracy"]}


def task_figures(fixture):
    expected, found = golden(f"{fixture}/expected.json"), {}
    for name, key in (("accuracy", STRICT), ("accuracy by first capital", LENIENT)):
        found |= {name if task == "Avg" else f"{name} / {task}": figure for task, figure in expected[key].items()}
    return found


def egoschema_figures():
    (line,) = golden("egoschema/expected.json")["scorer_printout"]
    return {"accuracy": 100 * float(line.removeprefix("ACC:"))}


def textvqa_figures():
    return {"accuracy": float(golden("textvqa/expected.json")["scorer_printout"][-1].split()[1].rstrip("%"))}


SCORED = {  # benchmark -> headline's name among the figures, figures, how many answers are missing
    "textvqa": ("accuracy", textvqa_figures, 0),
    "gqa": ("accuracy", gqa_figures, 0),
    "pope": ("mean F1", pope_figures, 0),
    "mme": ("perception", mme_figures, 0),
    "scienceqa": ("with a picture", lambda: {"all": golden("scienceqa/expected.json")["acc"], "with a picture": 400 / 9}, 1),
    "mmbench": ("circular", lambda: mmbench_figures("mmbench"), 0),
    "mmbench_as_published": ("circular", lambda: mmbench_figures("mmbench"), 0),
    "mmbench_cn": ("circular", lambda: mmbench_figures("mmbench_cn"), 0),
    "seed": ("total", seed_figures, 1),
    "mvbench": ("accuracy", lambda: task_figures("mvbench"), 0),
    "mlvu": ("accuracy", lambda: task_figures("mlvu"), 0),
    "egoschema": ("accuracy", egoschema_figures, 1),
}


@pytest.mark.parametrize("name", SCORED)
def test_published_numbers(place, name):
    headline, figures, missing = SCORED[name]
    place.lay(fixture_of(name))
    answers = answers_of(fixture_of(name))
    if missing:
        status, out, err = place.part("score", name, answers=answers)
        assert (status, out) == (2, "") and "--allow-missing" in err and not place.run.exists()
    found = place.score(name, answers, *["--allow-missing"] * bool(missing))
    for figure, value in figures().items():
        assert found["figures"][figure] == pytest.approx(value, abs=0.005 if name in ("gqa", "textvqa", "seed") else 1e-9), (
            figure
        )
    assert found["headline"] == found["figures"][headline]
    # the lines of the answers file, and what is missing, are all records
    rows = len(answers.read_text().splitlines())
    assert found["counts"] == {"records": rows + missing, "missing": missing, "faults": 0}
    scored = [json.loads(line) for line in (place.run / name / "scored.jsonl").read_text().splitlines()]
    assert [row["key"] for row in scored] == list(range(rows + missing))
    assert sum(row["fault"] == "missing" and not row["right"] for row in scored) == missing


def test_what_scores_hold(place):
    place.lay("mme")
    status, out, _ = place.part("score", "mme", "--name", "a model", answers=answers_of("mme"))
    found = json.loads((place.run / "mme" / "scores.json").read_text())
    assert status == 0 and out.splitlines() == [
        f"MME: {mme_figures()['perception']:.2f} ({found['headline_name']}), {found['counts']['records']} records",
        "  note: 56 records, the published data has 2374",
        "  note: 7 replies begin with neither yes nor no and count as wrong",
    ]
    assert found["notes"] == ["7 replies begin with neither yes nor no and count as wrong"]
    assert found["judge"] is None and found["published"] == dict(benchmarks()["mme"].published)
    assert (found["benchmark"], found["title"]) == ("mme", "MME")
    assert found["settings"] == {"model": "a model", "answers": str(answers_of("mme").resolve())}


# ---- what is handed in


UPLOADS = {  # benchmark -> its file, the fixture's
    "vqav2": ("vqav2_upload.json", "vqav2/expected_upload.json"),
    "vizwiz": ("vizwiz_upload.json", "vizwiz/expected_upload.json"),
    "gqa": ("testdev_balanced_predictions.json", "gqa/expected_testdev_balanced_predictions.json"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads(place, name):
    """VizWiz's answers are in disorder, the last line of VQAv2's is cut off."""
    place.lay(name)
    file, expected = UPLOADS[name]
    more = ["--allow-missing"] if name == "vqav2" else []
    files, out = place.export(name, answers_of(name), *more)
    assert [f.name for f in files] == [file] and out.strip() == str(files[0])
    assert json.loads(files[0].read_text()) == golden(expected)


def test_a_line_that_is_cut_off_is_refused_and_told(place):
    place.lay("vqav2")
    status, out, err = place.part("export", "vqav2", answers=answers_of("vqav2"))
    assert (status, out) == (2, "") and "line 3 of" in err and "not a JSON object" in err and not place.run.exists()
    status, _, err = place.part("export", "vqav2", "--allow-missing", answers=answers_of("vqav2"))
    assert status == 0 and err.startswith("note: lines 3 of ")


def test_mme_tables(place):
    place.lay("mme")
    files, _ = place.export("mme", answers_of("mme"))
    expected = golden("mme/expected.json")["converted_files"]
    assert len(files) == 14 and {f.stem: f.read_text() for f in files if f.stem in expected} == expected


@pytest.mark.parametrize("name", ["mmbench_as_published", "mmbench_cn"])
def test_mmbench_tables(place, name):
    import openpyxl

    place.lay(fixture_of(name))
    (file,), _ = place.export(name, answers_of(fixture_of(name)))
    expected = golden(f"{fixture_of(name)}/expected.json")
    cells = [list(row) for row in openpyxl.load_workbook(file).active.iter_rows(values_only=True)]
    assert cells == [expected["xlsx_columns"], *expected["xlsx_rows"]]


def test_seeds_upload(place):
    place.lay("seed")
    (file,), _ = place.export("seed", answers_of("seed"), "--allow-missing")
    expected = lines("seed/expected_upload_without_109.jsonl") + [{"question_id": "109", "prediction": ""}]
    assert [json.loads(line) for line in file.read_text().splitlines()] == expected


def test_scienceqas_results(place):
    place.lay("scienceqa")
    (file,), _ = place.export("scienceqa", answers_of("scienceqa"), "--allow-missing")
    written, expected = json.loads(file.read_text()), golden("scienceqa/expected.json")
    assert written["results"] == expected["predicted_index"]
    assert [written[name] for name in ("acc", "correct", "count")] == [expected[n] for n in ("acc", "correct", "count")]


def test_egoschemas_submission(place):
    place.lay("egoschema")
    (file,), _ = place.export("egoschema", answers_of("egoschema"), "--allow-missing")
    expected = golden("egoschema/expected.json")
    handed = expected["submission_format (official server; built by hand from the same predictions)"]
    assert json.loads(file.read_text()) == handed | {"uid6": -1}


def test_mm_vets_results(place):
    rows = lines("mmvet/answers.jsonl")
    questions = [{"question_id": r["question_id"], "image": "x.png", "text": r["prompt"]} for r in rows]
    write_lines(place.root / "mm-vet" / "llava-mm-vet.jsonl", questions)
    (file,), _ = place.export("mm_vet", GOLDEN / "mmvet" / "answers.jsonl")
    assert file.read_text() == (GOLDEN / "mmvet" / "expected_results.json").read_text()


# ---- refusals: one sentence, status 2


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"question_id": "x"', "line 1 of .* is not a JSON object"),
        ("[1, 2]", "line 1 of .* is not a JSON object"),
        ('{"question_id": "nobody asked", "prompt": "?", "text": "x"}', "answer 1 in .* is to no record of TextVQA"),
        (lambda row: {n: v for n, v in row.items() if n != "text"}, "answer 1 in .* holds no reply: 'text' is missing"),
        (lambda row: row | {"text": None}, "answer 1 in .* holds None in place of a reply"),
        (lambda row: row, r"11 of 12 records have no answer \(number 1, 2, .*…\)"),
    ],
)
def test_broken_answers(place, tmp_path, line, said):
    place.lay("textvqa")
    row = lines("textvqa/answers.jsonl")[0]
    (tmp_path / "a.jsonl").write_text(line if isinstance(line, str) else json.dumps(line(row)))
    err = place.refused("score", "textvqa", "--data", place.root, "--out", place.run, "--answers", tmp_path / "a.jsonl")
    assert re.search(said, err) and not place.run.exists()


def test_answers_of_another_benchmark(place):
    place.lay("pope")
    err = place.refused("score", "pope", "--data", place.root, "--out", place.run, "--answers", answers_of("mme"))
    assert "is to no record of POPE" in err


def test_an_answer_that_comes_twice(place, tmp_path):
    place.lay("vizwiz")
    rows = lines("vizwiz/answers.jsonl")
    write_lines(tmp_path / "a.jsonl", [*rows, rows[0]])
    err = place.refused("export", "vizwiz", "--data", place.root, "--out", place.run, "--answers", tmp_path / "a.jsonl")
    assert f"answer {len(rows) + 1} in" in err


BAD_WORDS = [
    (["score", "unheard"], "there is no benchmark 'unheard': choose among image, video, vqav2"),
    (["score", "pope"], "there is no .*llava_pope_test.jsonl"),
    (["score", "textvqa", "--answers", "nowhere.jsonl"], "there is no nowhere.jsonl"),
    (["score", "textvqa", "--wording", "nowhere.json"], "there is no nowhere.json"),
    (["score", "textvqa", "--folder", "nonsense"], "--folder nonsense: expected BENCHMARK=FOLDER"),
    (["score", "textvqa", "--folder", "unheard=x"], "--folder unheard=x: expected"),
    (["score", "textvqa", "--folder", "textvqa="], "--folder textvqa=: expected"),
    (["score", "textvqa"], "is no run: ask a model"),
    (["score", "textvqa", "--allow-missing"], "is no run: ask a model"),
    (["export", "textvqa"], "TextVQA has nothing to hand in: lmm eval score textvqa"),
    (["export", "vizwiz"], "there is no .*llava_test.jsonl"),
    (["score", "textvqa", "--judge", "m", "--judge-url", "ftp://x"], "the judge's address must be like"),
    (["score", "textvqa", "--judge", "m", "--judge-runs", "0"], "at least one run"),
    *((["answer", "textvqa", "--shard", shard], f"--shard {shard}: expected") for shard in ("3/2", "0/2", "x", "1")),
]


@pytest.mark.parametrize("words, said", BAD_WORDS, ids=lambda value: "_".join(value[:4]) if isinstance(value, list) else "")
def test_refusals(place, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place.lay("textvqa")
    err = place.refused(*words, "--data", place.root, "--out", place.run)
    assert re.search(said, err), err
    assert not (place.run / "settings.json").exists()


def test_run_folders_that_are_something_else(place, tmp_path):
    place.lay("textvqa")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for other in ("other", "file"):
        words = ["score", "textvqa", "--data", place.root, "--out", tmp_path / other, "--answers", answers_of("textvqa")]
        assert "holds no settings.json of a run" in place.refused(*words)
    assert [f.name for f in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_answers_of_others_are_not_laid_to_a_model(place):
    """A run of a model keeps its scores; a run of others' answers keeps its name."""
    place.lay("textvqa")
    words = ["score", "textvqa", "--data", place.root, "--out", place.run, "--answers", answers_of("textvqa")]
    place.run.mkdir()
    (place.run / "settings.json").write_text('{"model": "m", "digest": "0123"}')
    assert "begun otherwise" in place.refused(*words)
    (place.run / "settings.json").write_text('{"model": "m"}')
    assert "begun otherwise (model was 'm' and is 'n')" in place.refused(*words, "--name", "n")
    assert place.score("textvqa", answers_of("textvqa"))["settings"]["model"] == "m"


def test_a_benchmark_that_cannot_be_scored_does_not_keep_others_from_it(place):
    place.lay("textvqa")
    place.score("textvqa", answers_of("textvqa"))
    (place.run / "textvqa" / "scores.json").unlink()
    write_lines(place.run / "textvqa" / "part.1of1.jsonl", parts("textvqa"))
    status, out, err = place.part("score", "image")
    assert (
        status == 2 and err.startswith("error: GQA: there is no ") and "MM-Vet: there is no " in err and err.count("\n") == 1
    )
    assert "VQAv2: scored by its server only: lmm eval export vqav2" in out and "TextVQA: " in out
    assert (place.run / "textvqa" / "scores.json").exists()


def parts(fixture):
    """The answers as a run folder holds them."""
    return [{"key": i, "reply": row["text"], "fault": ""} for i, row in enumerate(lines(f"{fixture}/answers.jsonl"))]


def test_answers_of_a_run_folder(place):
    place.lay("textvqa")
    expected = place.score("textvqa", answers_of("textvqa"))
    write_lines(place.run / "textvqa" / "part.1of1.jsonl", parts("textvqa"))
    (place.run / "textvqa" / "settings.json").write_text('{"max_new_tokens": 128}')
    found = place.score("textvqa", None)
    assert found["settings"] == {"model": "answers", "max_new_tokens": 128}
    assert found | {"settings": 0} == expected | {"settings": 0}
    write_lines(place.run / "textvqa" / "part.1of1.jsonl", parts("textvqa")[:-1])
    err = place.refused("score", "textvqa", "--data", place.root, "--out", place.run)
    assert "1 of 12 records have no answer (number 11)" in err


# ---- tables and lists


def test_a_table_of_two_runs(place, tmp_path):
    for fixture in ("textvqa", "pope"):
        place.lay(fixture)
    for name in ("one", "two"):
        place.score("textvqa", answers_of("textvqa"), "--name", name, out=tmp_path / name)
    place.score("pope", answers_of("pope"), out=tmp_path / "two")
    files = ["--markdown", tmp_path / "t.md", "--html", tmp_path / "t.html"]
    status, out, err = place.call("table", tmp_path / "one", tmp_path / "two", *files, "--data", place.root)
    assert status == 0, err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert rows[0][2:4] == ["one", "two"] and "LLaVA-v1.5-7B (published)" in rows[0]
    row = {row[0].split(" ")[0]: row for row in rows}
    expected = f"{textvqa_figures()['accuracy']:.1f}"
    assert [cell.split(" ")[0] for cell in row["TextVQA"][2:4]] == [expected, expected]
    assert row["POPE"][2] == "–" and row["POPE"][3].startswith(f"{pope_figures()['mean F1']:.1f}")
    assert "58.2" in row["TextVQA"] and (tmp_path / "t.md").read_text() == out
    page = (tmp_path / "t.html").read_text()
    assert page.lower().startswith("<!doctype html>") and all(text in page for text in ("one", "two", "TextVQA", expected))


def test_tables_that_cannot_be(place, tmp_path):
    assert "is no run" in place.refused("table", tmp_path)
    place.lay("textvqa")
    place.score("textvqa", answers_of("textvqa"))
    assert "given twice" in place.refused("table", place.run, place.run)
    status, _, err = place.call("table", place.run, "--markdown", tmp_path / "no" / "t.md")
    assert status == 2 and "t.md cannot be written" in err and err.count("\n") == 1


def test_the_list(place):
    status, out, _ = place.call("list")
    names = [line.split()[0] for line in out.splitlines()]
    assert status == 0 and names == list(benchmarks())
    assert {*GROUPS["image"], *GROUPS["video"], "demo", "mmbench_as_published"} <= set(names)
    assert len(GROUPS["image"]) == 12 and len(GROUPS["video"]) == 11  # nineteen, five of them Video-ChatGPT's aspects


def test_scoring_needs_no_jax(place):
    place.lay("textvqa")
    words = ["eval", "score", "textvqa", "--data", place.root, "--out", place.run, "--answers", answers_of("textvqa")]
    code = "import sys; from lmm_jax.cli import main; print(main(sys.argv[1:]), {'jax', 'torch', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"

"""What counts as right, beside each answer: in the scores of every benchmark, in scored.jsonl, and on the page."""

import dataclasses
import json
import re
import shutil

import pytest
from eval_fixtures import GOLDEN, LAYOUTS, Place, answers_of, golden, lay_out, write_lines
from evaluation.judging import FIXTURES, canned, read, write

from lmm_jax.evaluation import registry
from lmm_jax.evaluation.benchmark import Answered, Run, Score

BENCHMARKS = registry.benchmarks()
EXPECTED = {  # benchmark -> what is expected in its first records
    "textvqa": ["2 / two / unanswerable", "acme / Acme Inc. / the acme / acme co / x"],  # the most frequent first
    "gqa": ["yes", "blue", "toy car"],
    "pope": ["no", "yes", "yes", "no"],
    "mme": ["Yes", "No", "Yes"],
    "scienceqa": ["A. red", "B. green", "C. blue", "B. y"],
    "mmbench": ["B. a cup", "A. a cup", "D. a cup", "C. a cup", "A. yes"],
    "mmbench_as_published": ["B. a cup", "A. a cup", "D. a cup", "C. a cup", "A. yes"],
    "mmbench_cn": ["A. 猫", "B. 猫"],
    "seed": ["A. w", "B. x", "C. y"],
    "mvbench": ["(A) a tin", "(B) two"],
    "mlvu": ["(A) a tin", "(B) a cup", "(B) a cup", "(C) a bag"],
    "egoschema": ["A: Option text 0 of 0.", "B: Option text 1 of 1."],
}
LETTER_ALONE = ("mmbench", "mmbench_as_published", "mmbench_cn", "seed")  # that are right only with nothing after it


def folder_of(name, root):
    fixture = name.removesuffix("_as_published")
    return lay_out(root, fixture) if fixture in LAYOUTS else shutil.copytree(GOLDEN / fixture, root / fixture)


def scores(name, folder, judge=None):
    """Scores of runs in which all is answered, nothing is, and all media are broken."""
    records = BENCHMARKS[name].records(folder)
    runs = [Run(folder, [Answered(r, "x", fault) for r in records], judge) for fault in ("", "missing", "no such file")]
    return [BENCHMARKS[name].score(run) for run in runs]


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_expected_is_known_whatever_was_answered(name, tmp_path):
    answered, *others = scores(name, folder_of(name, tmp_path))
    assert answered.expected[: len(EXPECTED[name])] == EXPECTED[name]
    assert len(answered.expected) == len(answered.right)
    assert all(other.expected == answered.expected for other in others)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_expected_is_right(name, tmp_path):
    """Whoever says so gets it right: of TextVQA's answers the first, though once only two agree on it."""
    folder = folder_of(name, tmp_path)
    expected = scores(name, folder)[0].expected
    said = [text[:1] if name in LETTER_ALONE else text.split(" / ")[0] for text in expected]
    answers = [Answered(r, reply) for r, reply in zip(BENCHMARKS[name].records(folder), said, strict=True)]
    right = BENCHMARKS[name].score(Run(folder, answers)).right
    least = 0.6 if name == "textvqa" else 1.0
    assert all(hit is None or hit >= least for hit in right) and right.count(None) < len(right)


@pytest.mark.parametrize(
    "name, fixture, expected",
    [
        ("llava_bench", "llavabench", [f"Reference answer {i}." for i in range(4)]),
        ("mm_vet", "mmvet_judge", ["1 <AND> 2", "Zoe <OR> Z.", "It is so.", "left", "STOP"]),
        *(
            (f"{name}_qa", "video_qa", ["cat", "dog", "run", "red", "two", "yes"])
            for name in ("msvd", "msrvtt", "activitynet")
        ),
        ("videochatgpt_correctness", "video_generative", ["A kite flies.", "A child."]),
        ("videochatgpt_consistency", "video_generative", ["A kite flies.", "A kite flies.", "A child.", "A child."]),
    ],
)
def test_references_of_judged_benchmarks(name, fixture, expected, tmp_path):
    folder = shutil.copytree(FIXTURES / fixture, tmp_path / "data")
    if name == "mm_vet":
        truth = read(folder / "mm-vet.json").items()
        rows = [{"question_id": int(n[3:]), "image": e["imagename"], "text": e["question"]} for n, e in truth]
        write_lines(folder / "llava-mm-vet.jsonl", rows)
    for file in folder.glob("*_qa.json"):
        write(folder / "Benchmarking_QA" / file.name, read(file)[:2])
    replies = {"llava_bench": "8 9", "mm_vet": "1.0"}
    judge = canned(tmp_path / "replies.jsonl", lambda request: replies.get(name, "{'pred': 'yes', 'score': 4}"))
    assert [score.expected for score in scores(name, folder, judge)] == [expected] * 3


def test_the_demo_world(tmp_path):
    rows = [{"id": i, "image": "x.png", "type": "colour", "question": "?", "answer": a} for i, a in enumerate(["red", "two"])]
    write_lines(tmp_path / "questions.jsonl", rows)
    assert [score.expected for score in scores("demo", tmp_path)] == [["red", "two"]] * 3


def test_there_may_be_none(tmp_path):
    """Where no option is right, or only a server knows which."""
    folder = folder_of("mlvu", tmp_path)
    entries = read(folder / "json" / "4_count.json")
    write(folder / "json" / "4_count.json", [entries[0] | {"answer": "a jar"}, *entries[1:]])
    assert scores("mlvu", folder)[0].expected[:2] == [None, "(B) a cup"]
    folder = folder_of("egoschema", tmp_path)
    entries = read(folder / "mc.json")
    write(folder / "mc.json", [{k: v for k, v in entries[0].items() if k != "answer"}, entries[1] | {"answer": 1.0}])
    assert scores("egoschema", folder)[0].expected == [None, "B: Option text 1 of 1."]


def test_it_is_one_line(tmp_path):
    folder = folder_of("scienceqa", tmp_path)
    problems = read(folder / "problems.json")
    problems["10"]["choices"][0] = " a\r\n\tred\u2028one "
    problems["11"]["choices"][1] = 7
    write(folder / "problems.json", problems)
    assert scores("scienceqa", folder)[0].expected[:2] == ["A. a red one", "B. 7"]


# ---- scored.jsonl and the page


@pytest.fixture
def place(tmp_path, capsys):
    return Place(tmp_path, capsys)


def scored(place, name):
    return [json.loads(line) for line in (place.run / name / "scored.jsonl").read_text().splitlines()]


def test_it_is_written_beside_each_answer(place):
    place.lay("seed")
    figures = place.score("seed", answers_of("seed"), "--allow-missing")
    assert not {"expected", "right"} & set(figures)
    rows = scored(place, "seed")
    letters = [entry["answer"] for entry in golden("seed/SEED-Bench.json")["questions"]]
    assert [row["expected"][:3] for row in rows] == [f"{letter}. " for letter in letters]
    assert rows[-1]["fault"] == "missing" and rows[-1]["expected"] == "D. z"


def test_it_is_null_where_it_is_unknown(place, monkeypatch):
    place.lay("textvqa")
    without = dataclasses.replace(BENCHMARKS["textvqa"], score=lambda run: Score(1.0, {}, [1.0] * len(run.answers)))
    monkeypatch.setattr(registry, "choose", lambda names, words: [without])
    place.score("textvqa", answers_of("textvqa"))
    assert [row["expected"] for row in scored(place, "textvqa")] == [None] * 12


def shown(place, examples=20):
    """What the page says was expected, in the order of the examples."""
    status, _, err = place.call("table", place.run, "--html", place.run / "t.html", "--examples", examples)
    assert status == 0, err
    return re.findall(r'<div class="expected">expected: <bdi>(.*?)</bdi></div>\n<div class="replies">', page(place))


def page(place):
    return (place.run / "t.html").read_text()


def test_the_page_shows_it_under_the_question(place):
    place.lay("seed")
    place.score("seed", answers_of("seed"), "--allow-missing")
    assert shown(place) == ["B. x", "C. y", "A. w", "C. y", "A. w", "D. z", "B. x", "D. z"]  # wrong ones, then right ones
    assert len(shown(place, examples=1)) == 2


def test_the_page_of_an_older_run_goes_without(place):
    place.lay("seed")
    place.score("seed", answers_of("seed"), "--allow-missing")
    rows = scored(place, "seed")
    old = [{name: value for name, value in row.items() if name != "expected"} for row in rows]
    write_lines(place.run / "seed" / "scored.jsonl", [*old[:-2], rows[-2] | {"expected": "x" * 4000}, old[-1]])
    assert shown(place) == ["x" * 3000 + " … (1,000 more characters)"]
    assert page(place).count("<article>") == 8

"""LLaVA-Bench and MM-Vet."""

import csv
import io
import json
import shutil

import pytest
from eval_fixtures import belongs
from evaluation.judging import FIXTURES, Recorder, canned, named, read, read_rows, run_of, write, write_rows

from lmm_jax.errors import UserError
from lmm_jax.evaluation import judged
from lmm_jax.evaluation.wording import load

BENCH, VET = (named(judged.BENCHMARKS, name) for name in ("llava_bench", "mm_vet"))
REPLIES = [f"Candidate answer {i}." for i in range(4)]
VERDICTS = read(FIXTURES / "llavabench" / "expected.json")["judge_replies_in_order"]
EXPECTED = read(FIXTURES / "mmvet_judge" / "expected.json")


def by_candidate(verdicts=VERDICTS):
    return Recorder(dict(zip(REPLIES, verdicts)))


def judge(tmp_path, recorder, **settings):
    return canned(tmp_path / "replies.jsonl", recorder, **settings)


@pytest.fixture
def bench(tmp_path):
    return shutil.copytree(FIXTURES / "llavabench", tmp_path / "bench")


@pytest.fixture
def vet(tmp_path):
    """MM-Vet's folder, with the question file of eval.zip."""
    folder = tmp_path / "vet"
    truth = read(FIXTURES / "mmvet_judge" / "mm-vet.json")
    write(folder / "mm-vet.json", truth)
    rows = [{"question_id": int(n[3:]), "image": e["imagename"], "text": e["question"]} for n, e in truth.items()]
    write_rows(folder / "llava-mm-vet.jsonl", rows)
    return folder


# ---- LLaVA-Bench


def test_bench_records_and_rows(bench):
    records = BENCH.records(bench)
    assert [r.text for r in records] == [row["text"] for row in read_rows(bench / "questions.jsonl")]
    assert records[2].images == (str(bench / "images" / "002.jpg"),)
    published = read_rows(bench / "answers.jsonl")
    for record, row in zip(records, published):
        assert belongs(BENCH, record, row)
        assert BENCH.reply_of(row) == REPLIES[record.key]
        assert set(BENCH.answer_row(record, "x")) == set(row) - {"answer_id", "model_id"}
    assert not belongs(BENCH, records[0], published[1])
    assert BENCH.max_new_tokens == 1024, "evaluation spec section 7, T1"


def test_bench_figures_as_published(bench, tmp_path):
    """-1 for what cannot be read, as the published script has it, beside the figures without it."""
    score = BENCH.score(run_of(BENCH, bench, REPLIES, judge(tmp_path, by_candidate())))
    printed = read(bench / "expected.json")[
        "summary_printout (columns: name, 100*candidate/reference, 10*mean reference, 10*mean candidate)"
    ]
    for line in printed[1:-1]:
        name, *figures = line.rsplit(" ", 3)
        part = name.removeprefix("all").removeprefix("llava_bench_")
        for kind, figure in zip(("relative", "reference", "candidate"), figures):
            found = score.figures[f"as published, {kind} score" + (f" / {part}" if part else "")]
            assert round(found, 1) == float(figure), (name, kind)


def test_bench_verdicts_that_cannot_be_read_are_asked_for_again_and_left_out(bench, tmp_path):
    recorder = by_candidate()
    score = BENCH.score(run_of(BENCH, bench, REPLIES, judge(tmp_path, recorder)))
    assert score.headline == score.figures["relative score"] == pytest.approx(100 * 7.25 / 9.5)
    assert score.figures["relative score / conv"] == pytest.approx(100 * 6 / 9)
    assert (score.figures["relative score / detail"], score.right) == (0.0, [0.6, None, 0.85, None])
    assert any("2 not judged, left out" in note and "3 times" in note and "records 1, 3" in note for note in score.notes)
    assert any("relative score / detail divides by zero" in note for note in score.notes)
    assert len(recorder.requests) == 2 + 2 * 3
    pairs = [tuple(row["tuple"]) for row in read_rows(bench / "expected_reviews.jsonl")]
    assert [right is None for right in score.right] == [pair == (-1, -1) for pair in pairs]


def test_bench_second_verdict_counts(bench, tmp_path):
    replies = iter(["no scores", "10 5"] * 4)
    score = BENCH.score(run_of(BENCH, bench, REPLIES, judge(tmp_path, lambda request: next(replies), workers=1)))
    assert score.headline == 50 == score.figures["as published, relative score"]
    assert score.notes == []


def test_bench_judge_calls(bench, tmp_path):
    calls = read(bench / "expected_judge_calls.json")
    words = {"system": calls[0]["messages"][0]["content"], "user": "{context}|{question}|{reference}|{candidate}|{rule}"}
    words |= {f"rule_{category}": f"as {category}" for category in ("conv", "detail", "complex")}
    write(tmp_path / "words.json", {"name": "given", "llava_bench": words})
    benchmark = named(judged.benchmarks(load(tmp_path / "words.json")), "llava_bench")
    recorder = by_candidate(["8 9"] * 4)
    benchmark.score(run_of(benchmark, bench, REPLIES, judge(tmp_path, recorder, workers=1)))
    told = []
    for request, call in zip(recorder.requests, calls, strict=True):
        told.append(request["messages"][1]["content"])
        request["messages"][1]["content"] = "(text not kept)"
        assert request == call | {"model": "made-up"}
    assert told[0] == "A red kite over a beach.|What is it?|Reference answer 0.|Candidate answer 0.|as conv"
    assert told[2] == "Two people cook.\nOne holds a pan.|Why?|Reference answer 2.|Candidate answer 2.|as complex"


def test_bench_files_are_joined_by_id(bench, tmp_path):
    """T7: the published script zips lines."""
    expected = BENCH.score(run_of(BENCH, bench, REPLIES, judge(tmp_path, by_candidate())))
    for name in ("answers_gpt4.jsonl", "context.jsonl"):
        write_rows(bench / name, read_rows(bench / name)[::-1])
    recorder = Recorder({})
    assert BENCH.score(run_of(BENCH, bench, REPLIES, judge(tmp_path, recorder))) == expected
    assert recorder.requests == [], "the same was asked"


def test_bench_missing_answers_are_worth_nothing(bench, tmp_path):
    recorder = by_candidate(["10 10"] * 4)
    score = BENCH.score(run_of(BENCH, bench, [REPLIES[0], None, REPLIES[2], REPLIES[3]], judge(tmp_path, recorder)))
    assert (score.headline, score.right[1], len(recorder.requests)) == (75.0, 0.0, 3)
    assert BENCH.score(run_of(BENCH, bench, [None] * 4, judge(tmp_path, recorder))).headline == 0


def test_bench_runs_are_averaged(bench, tmp_path):
    def verdicts(attempt):
        return {0: "10 5", 3: "10 6", 6: "10 10"}[attempt]

    class Attempts:
        count = 0

    def reply(request):
        Attempts.count += 1
        return verdicts(3 * ((Attempts.count - 1) // 4))

    score = BENCH.score(run_of(BENCH, bench, REPLIES, judge(tmp_path, reply, runs=3, workers=1)))
    assert score.headline == pytest.approx(70)
    assert score.right == pytest.approx([0.7] * 4)
    attempts = [row["attempt"] for row in read_rows(tmp_path / "replies.jsonl")]
    assert attempts == [0] * 4 + [3] * 4 + [6] * 4


@pytest.mark.parametrize("name", ["questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"])
def test_bench_files_that_do_not_fit(bench, tmp_path, name):
    run = run_of(BENCH, bench, REPLIES, judge(tmp_path, by_candidate()))
    write_rows(bench / name, read_rows(bench / name)[:1])
    with pytest.raises(UserError, match=f"{name} holds no"):
        BENCH.score(run)
    (bench / name).unlink()
    with pytest.raises(UserError, match="there is no"):
        BENCH.score(run)


def test_bench_unknown_category(bench, tmp_path):
    rows = read_rows(bench / "questions.jsonl")
    write_rows(bench / "questions.jsonl", [rows[0] | {"category": "other"}, *rows[1:]])
    with pytest.raises(UserError, match="category 'other'"):
        BENCH.score(run_of(BENCH, bench, REPLIES, judge(tmp_path, by_candidate())))


@pytest.mark.parametrize("benchmark", judged.BENCHMARKS)
def test_a_judge_is_needed(benchmark, bench, vet):
    folder, count = {"llava_bench": (bench, 4), "mm_vet": (vet, 5)}[benchmark.name]
    assert benchmark.judged
    with pytest.raises(UserError, match="name the judge"):
        benchmark.score(run_of(benchmark, folder, ["x"] * count))


# ---- MM-Vet


def vet_replies():
    return list(read(FIXTURES / "mmvet_judge" / "results.json").values())


def test_vet_hand_over(tmp_path):
    rows = read_rows(FIXTURES / "mmvet" / "answers.jsonl")
    questions = [{"question_id": r["question_id"], "image": "x.png", "text": r["prompt"]} for r in rows]
    write_rows(tmp_path / "llava-mm-vet.jsonl", questions)
    run = run_of(VET, tmp_path, [row["text"] for row in rows])
    (file,) = VET.export(run, tmp_path)
    expected = FIXTURES / "mmvet" / "expected_results.json"
    assert file.read_text() == expected.read_text()
    (file,) = VET.export(run_of(VET, tmp_path, ["x is 3.", None, "Zoë"]), tmp_path)
    assert read(file) == read(expected) | {"v1_2": ""}


def test_vet_figures_and_calls(vet, tmp_path):
    recorder = Recorder(EXPECTED["judge_replies_in_order"])
    score = VET.score(run_of(VET, vet, vet_replies(), judge(tmp_path, recorder, workers=1)))
    assert score.right == [grade["score"][0] for grade in EXPECTED["grades"].values()]
    assert score.notes == []

    (header, values) = csv.reader(io.StringIO(EXPECTED["capability_csv"].replace("[np.float64(74.0)]", "")))
    figures = dict(zip(header, values))
    assert round(score.headline, 1) == float(figures["total"]) == 74.0
    assert score.figures["standard deviation of runs"] == float(figures["std"])
    for name in ("rec", "ocr", "know", "math", "spat"):
        assert round(score.figures[f"capability / {name}"], 1) == float(figures[name])
    (header, values) = csv.reader(io.StringIO(EXPECTED["capability_integration_csv"].replace("[np.float64(74.0)]", "")))
    for names, value in list(zip(header, values))[1:5]:
        assert round(score.figures[f"capabilities / {' + '.join(sorted(names.split('_')))}"], 1) == float(value)
    assert len(score.figures) == 2 + 5 + 4

    calls = read(FIXTURES / "mmvet_judge" / "expected_judge_calls.json")
    for request, call in zip(recorder.requests, calls, strict=True):
        (message,) = request["messages"]
        assert message["role"] == "user"
        assert request | call == request | {"model": call["model"], "last_lines": call["last_lines"]}
        last = message["content"].split("\n")[-2:]
        assert last[-1] == call["last_lines"][-1]
        assert last[0] == call["last_lines"][0] or call["last_lines"][0] == ""


def test_vet_published_examples_stand_before_the_question(vet, tmp_path):
    """The fixture's published examples end with a line break, ours do not: with theirs the last lines are the same."""
    write(tmp_path / "words.json", {"name": "given", "mm_vet": {"examples": "examples\n"}})
    benchmark = named(judged.benchmarks(load(tmp_path / "words.json")), "mm_vet")
    recorder = Recorder(EXPECTED["judge_replies_in_order"])
    benchmark.score(run_of(benchmark, vet, vet_replies(), judge(tmp_path, recorder, workers=1)))
    calls = read(FIXTURES / "mmvet_judge" / "expected_judge_calls.json")
    assert [r["messages"][0]["content"].split("\n")[-2:] for r in recorder.requests] == [c["last_lines"] for c in calls]


def test_vet_grades_that_stay_unreadable_are_0(vet, tmp_path):
    recorder = Recorder(["1.0", "1.0", "1.0", "1.0", "nothing"])
    score = VET.score(run_of(VET, vet, vet_replies(), judge(tmp_path, recorder, workers=1)))
    assert score.headline == pytest.approx(80) and score.right[4] == 0
    assert any("1 not judged, counted as 0" in note and "records 4" in note for note in score.notes)
    temperatures = [request["temperature"] for request in recorder.requests[4:]]
    assert temperatures == [0.0, 0.0, 0.5, 1.0, 1.5]
    last = [request["messages"][0]["content"].endswith("(digit): ") for request in recorder.requests[4:]]
    assert last == [False, True, True, True, True]
    assert [row["attempt"] for row in read_rows(tmp_path / "replies.jsonl")][4:] == [0, 1, 2, 3, 4]


def test_vet_missing_answers_are_0_and_not_judged(vet, tmp_path):
    replies, recorder = vet_replies(), Recorder(["1.0"])
    replies[0] = None
    score = VET.score(run_of(VET, vet, replies, judge(tmp_path, recorder)))
    assert score.headline == pytest.approx(80) and score.right[0] == 0
    assert score.figures["capability / math"] == 0 and len(recorder.requests) == 4


def test_vet_runs_are_averaged(vet, tmp_path):
    recorder = Recorder(["0.4"] * 5 + ["0.6"] * 5)
    score = VET.score(run_of(VET, vet, vet_replies(), judge(tmp_path, recorder, runs=2, workers=1)))
    assert score.headline == pytest.approx(50)
    assert score.figures["standard deviation of runs"] == pytest.approx(10)
    assert score.figures["capability / rec"] == pytest.approx(50)


def test_vet_files_that_do_not_fit(vet, tmp_path):
    run = run_of(VET, vet, vet_replies(), judge(tmp_path, Recorder(["1.0"])))
    truth = read(vet / "mm-vet.json")
    del truth["v1_3"]
    write(vet / "mm-vet.json", truth)
    with pytest.raises(UserError, match="v1_3"):
        VET.score(run)
    write(vet / "mm-vet.json", truth | {"v1_3": {"question": "?", "answer": "x", "capability": "rec"}})
    with pytest.raises(UserError, match="capability"):
        VET.score(run)


def test_vet_judge_calls_are_kept_and_a_second_scoring_makes_none(vet, tmp_path):
    first = VET.score(
        run_of(VET, vet, vet_replies(), judge(tmp_path, Recorder(EXPECTED["judge_replies_in_order"]), workers=1))
    )
    again = judge(tmp_path, Recorder([]))
    assert VET.score(run_of(VET, vet, vet_replies(), again)) == first
    assert (again.usage.calls, again.usage.cached) == (0, 6)
    assert json.dumps(first.figures)

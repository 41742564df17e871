"""MSVD-QA, MSRVTT-QA, ActivityNet-QA and Video-ChatGPT's five aspects."""

import shutil

import pytest
from eval_fixtures import belongs
from evaluation.judging import FIXTURES, Recorder, canned, named, read, read_rows, run_of, write

from lmm_jax.errors import UserError
from lmm_jax.evaluation import video_qa
from lmm_jax.evaluation.benchmark import Answered, Run
from lmm_jax.evaluation.wording import load

SETS = [named(video_qa.BENCHMARKS, name) for name in ("msvd_qa", "msrvtt_qa", "activitynet_qa")]
ASPECTS = [b for b in video_qa.BENCHMARKS if b.name.startswith("videochatgpt")]
SINGLE = [b for b in ASPECTS if not b.name.endswith("consistency")]
CONSISTENCY = named(video_qa.BENCHMARKS, "videochatgpt_consistency")
PROMPTS = read(FIXTURES / "prompts" / "video_prompts.json")
JUDGED = read(FIXTURES / "video_qa" / "expected_judge.json")
RATED = read(FIXTURES / "video_generative" / "expected_judge.json")
ELIDED = "(text not kept)"


def names(benchmark):
    return benchmark.name


def judge(tmp_path, recorder, **settings):
    return canned(tmp_path / "replies.jsonl", recorder, **settings)


def given(tmp_path, **sections):
    """A wording with these sections."""
    write(tmp_path / "words.json", {"name": "given"} | sections)
    return load(tmp_path / "words.json")


# ---- MSVD-QA, MSRVTT-QA, ActivityNet-QA


@pytest.fixture
def questions(tmp_path):
    """The questions and answers of the judge's fixture."""
    folder = tmp_path / "questions"
    rows = read_rows(FIXTURES / "video_qa" / "pred.jsonl")
    write(folder / "test_q.json", [{"video_name": "c", "question": r["question"], "question_id": r["id"]} for r in rows])
    write(folder / "test_a.json", [{"answer": r["answer"], "question_id": r["id"]} for r in rows])
    return folder


def preds():
    return [row["pred"] for row in read_rows(FIXTURES / "video_qa" / "pred.jsonl")]


def by_question():
    """The fixture's verdicts, by what stands in the message."""
    replies = JUDGED["judge_replies"]
    return Recorder({f"what is {i}?": replies[f"q{i}"] for i in range(6)})


@pytest.mark.parametrize(
    "benchmark, videos, prompt, file",
    [
        (SETS[0], "videos/clip{}", "msvd_msrvtt", "msvd"),
        (SETS[1], "videos/all/clip{}", "msvd_msrvtt", "msvd"),
        (SETS[2], "test_videos/v_clip{}", "activitynet", "activitynet"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_questions_rows_and_prompts(benchmark, videos, prompt, file, tmp_path):
    folder = FIXTURES / "video_qa"
    instruction = PROMPTS[prompt]["question_passed"].replace("what happens?", "{question}")
    section = {"instruction": instruction}
    words = given(tmp_path, msvd_msrvtt=section, activitynet_qa=section)
    records = named(video_qa.benchmarks(words), benchmark.name).records(folder)
    assert [r.video for r in records] == [str(folder / videos.format(i)) for i in (0, 1, 2, 3, 4, 0)]
    assert records[0].text == instruction.format(question="what is made-up thing 0?")

    rows = read_rows(folder / f"expected_answers_{file}.jsonl")
    by_id = {r.row["id"]: r for r in records}
    for row in rows:
        record = by_id[row["id"]]
        assert list(benchmark.answer_row(record, row["pred"]).items()) == list(row.items())
        assert benchmark.reply_of(row) == row["pred"]
        assert record.text.endswith(row["pred"].partition("prompt ending: ")[2])
        assert [r for r in records if belongs(benchmark, r, row)] == [record]
    assert benchmark.records(folder)[0].text.endswith(" one complete sentence:\nwhat is made-up thing 0?")
    assert benchmark.max_new_tokens == 1024


def test_the_instruction_is_whole_in_the_prompt():
    for name in ("msvd_msrvtt", "activitynet"):
        shown = PROMPTS[name]["full_prompt"].partition(") ")[2].removesuffix(" ASSISTANT:")
        assert PROMPTS[name]["question_passed"].endswith(shown)


@pytest.mark.parametrize("benchmark", SETS, ids=names)
def test_figures_and_calls(benchmark, questions, tmp_path):
    recorder = by_question()
    score = benchmark.score(run_of(benchmark, questions, preds(), judge(tmp_path, recorder)))
    printed = dict(line.split(": ") for line in JUDGED["printout"])
    assert score.headline / 100 == score.figures["accuracy"] / 100 == float(printed["Accuracy"])
    assert score.figures["score"] == float(printed["Average score"])
    assert score.right.count(1.0) == int(printed["Yes count"]) and score.right.count(0.0) == int(printed["No count"])
    assert score.right == [1.0, 0.0, 1.0, 0.0, None, None]
    assert len(recorder.requests) == JUDGED["calls_made"]
    assert any("1 not judged, left out" in note and "10 times" in note and "records 5" in note for note in score.notes)
    assert any("neither yes nor no to 1" in note for note in score.notes)


def test_the_first_judge_call(questions, tmp_path):
    words = given(tmp_path, video_qa={"system": ELIDED, "user": "{question}|{answer}|{pred}"})
    recorder = by_question()
    benchmark = named(video_qa.benchmarks(words), "msvd_qa")
    run = run_of(SETS[0], questions, preds(), judge(tmp_path, recorder, workers=1))
    benchmark.score(run)
    request = recorder.requests[0]
    assert request["messages"][1]["content"] == "what is 0?|cat|a cat"
    request["messages"][1]["content"] = ELIDED
    assert request == JUDGED["first_judge_call"] | {"model": "made-up"}


def test_missing_answers_are_wrong_and_not_judged(questions, tmp_path):
    """T9: the published script leaves them out."""
    recorder = by_question()
    replies = [None, *preds()[1:5], None]
    score = SETS[0].score(run_of(SETS[0], questions, replies, judge(tmp_path, recorder)))
    assert score.right == [0.0, 0.0, 1.0, 0.0, None, 0.0]
    assert score.headline == pytest.approx(20) and score.figures["score"] == pytest.approx(10 / 6)
    assert len(recorder.requests) == 4
    nothing = SETS[0].score(run_of(SETS[0], questions, [None] * 6, judge(tmp_path, recorder)))
    assert (nothing.headline, nothing.figures["score"]) == (0, 0)


def test_no_verdict_of_yes_or_no(questions, tmp_path):
    score = SETS[0].score(run_of(SETS[0], questions, preds(), judge(tmp_path, Recorder(["{'pred': '?', 'score': 2}"]))))
    assert (score.headline, score.figures["score"]) == (0, 2)
    assert any("accuracy divides by zero" in note for note in score.notes)


def test_answers_are_joined_by_id(questions, tmp_path):
    """T7: the published script joins them by place, and fails with ids that are numbers."""
    expected = [r.row for r in SETS[0].records(questions)]
    write(questions / "test_a.json", read(questions / "test_a.json")[::-1])
    assert [r.row for r in SETS[0].records(questions)] == expected
    for name in ("test_q.json", "test_a.json"):
        entries = read(questions / name)
        write(questions / name, [e | {"question_id": int(e["question_id"][1:])} for e in entries])
    numbered = SETS[0].records(questions)
    assert [r.row for r in numbered] == [row | {"id": int(row["id"][1:])} for row in expected]
    assert belongs(SETS[0], numbered[3], {"id": "3"})


def test_question_files_that_do_not_fit(questions):
    answers = read(questions / "test_a.json")
    for wrong, sentence in ((answers[1:], "'q0'"), ([*answers, answers[0]], "repeats"), ([{"answer": "x"}], "question_id")):
        write(questions / "test_a.json", wrong)
        with pytest.raises(UserError, match=sentence):
            SETS[0].records(questions)


def test_answers_are_never_executed(questions, tmp_path):
    """T14: the published script evaluates answers files and replies."""
    trap = tmp_path / "trap"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    run = run_of(SETS[0], questions, [code] * 6, judge(tmp_path, lambda request: f"{{'pred': {code}, 'score': {code}}}"))
    with pytest.raises(UserError, match="nothing could be judged"):
        SETS[0].score(run)
    assert not trap.exists()


# ---- Video-ChatGPT


@pytest.fixture
def entries(tmp_path):
    folder = tmp_path / "benchmarking"
    for name in ("generic_qa.json", "consistency_qa.json"):
        (folder / "Benchmarking_QA").mkdir(parents=True, exist_ok=True)
        shutil.copy(FIXTURES / "video_generative" / name, folder / "Benchmarking_QA" / name)
    shutil.copy(FIXTURES / "video_generative" / "generic_qa.json", folder / "Benchmarking_QA" / "temporal_qa.json")
    return folder


def answered(benchmark, folder, rows, recorder, tmp_path):
    """A run in which each record whose video is there is answered as the published rows say."""
    records = [r for r in benchmark.records(folder) if not r.video.endswith("missing")]
    return Run(folder, [Answered(r, row) for r, row in zip(records, rows)], judge(tmp_path, recorder, workers=1))


def keys(run, step=1):
    """What the published scripts call the records that are judged: the video and a running number."""
    counts, found = {}, []
    for a in run.answers[::step]:
        name = a.record.row["video_name"]
        found.append(f"{name}_{counts.get(name, 0)}")
        counts[name] = counts.get(name, 0) + 1
    return found


def test_three_aspects_are_about_one_run_of_answers():
    shared = {b.name: b.records for b in ASPECTS}
    assert shared["videochatgpt_correctness"] is shared["videochatgpt_detail"] is shared["videochatgpt_context"]
    assert len(set(shared.values())) == 3


@pytest.mark.parametrize("benchmark", SINGLE, ids=names)
def test_aspects_rows_figures_and_calls(benchmark, entries, tmp_path):
    published = read_rows(FIXTURES / "video_generative" / "expected_answers_generic_qa.jsonl")
    aspect = benchmark.name.removeprefix("videochatgpt_")
    expected, recorder = RATED[aspect], Recorder(["{'score': 4.8}", "{'score': '2'}", '{"score": 3}'])
    words = given(tmp_path, **{benchmark.name: {"system": ELIDED, "user": "{question}|{answer}|{pred}"}})
    run = answered(benchmark, entries, [row["pred"] for row in published], recorder, tmp_path)
    score = named(video_qa.benchmarks(words), benchmark.name).score(run)
    assert f"Average score for correctness: {score.headline}" == expected["printout"]
    assert score.figures == {"score": 3.0} and score.right == [0.8, 0.4, 0.6] and score.notes == []
    assert keys(run) == expected["record_keys"]

    told = [request["messages"][1]["content"] for request in recorder.requests]
    assert told == [f"{row['Q']}|{row['A']}|{row['pred']}" for row in published]
    recorder.requests[0]["messages"][1]["content"] = ELIDED
    call = {"model": "made-up", "messages": expected["first_judge_call"]["messages"]}  # the temperature is not sent
    assert recorder.requests[0] == call

    for a, row in zip(run.answers, published):
        assert list(benchmark.answer_row(a.record, a.reply).items()) == list(row.items())
        assert belongs(benchmark, a.record, row) and benchmark.reply_of(row) == a.reply
    assert not belongs(benchmark, run.answers[0].record, published[1])


def test_aspects_ask_the_bare_question(entries):
    record = SINGLE[0].records(entries)[0]
    assert record.text == PROMPTS["video_generative"]["question_passed"] == "What happens?"
    assert record.video == str(entries / "Test_Videos" / "v_a0")
    for name, records in (
        ("video_generative", SINGLE[0].records(entries)),
        ("video_consistency", CONSISTENCY.records(entries)),
    ):
        assert PROMPTS[name]["full_prompt"].endswith(f"USER: <image>\n{records[0].text} ASSISTANT:")
        assert PROMPTS[name]["question_passed"] == records[0].text


def test_the_generic_video_that_is_missing_counts_as_0(entries, tmp_path):
    recorder = Recorder(["{'score': 3}"])
    run = run_of(SINGLE[0], entries, ["a", "b", "c", None], judge(tmp_path, recorder))
    score = SINGLE[0].score(run)
    assert score.headline == 9 / 4 and score.right[3] == 0 and len(recorder.requests) == 3


def test_a_reply_that_never_parses_does_not_loop_for_ever(entries, tmp_path):
    recorder = Recorder({"Question about the video: Who": "no", "": "{'score': 4}"})
    score = SINGLE[0].score(run_of(SINGLE[0], entries, ["a", "b", "c", "d"], judge(tmp_path, recorder)))
    assert score.headline == 4 and score.right == [0.8, None, 0.8, 0.8]
    assert len(recorder.requests) == 3 + 10
    assert any("1 not judged, left out" in note and "records 1" in note for note in score.notes)


def test_consistency_rows_figures_and_calls(entries, tmp_path):
    published = read_rows(FIXTURES / "video_generative" / "expected_answers_consistency_qa.jsonl")
    recorder = Recorder(["{'score': 5}", "{'score': 2.9}"])
    words = {"system": ELIDED, "user": "{question1}|{question2}|{answer}|{pred1}|{pred2}"}
    benchmark = named(video_qa.benchmarks(given(tmp_path, videochatgpt_consistency=words)), CONSISTENCY.name)
    replies = [row[name] for row in published for name in ("pred1", "pred2")]
    run = answered(benchmark, entries, replies, recorder, tmp_path)
    assert [a.record.text for a in run.answers] == [row[name] for row in published for name in ("Q1", "Q2")]
    score = benchmark.score(run)
    assert f"Average score for correctness: {score.headline}" == RATED["consistency"]["printout"]
    assert score.right == [1.0, 1.0, 0.4, 0.4]
    assert keys(run, 2) == RATED["consistency"]["record_keys"]
    told = [request["messages"][1]["content"] for request in recorder.requests]
    assert told[0] == "What happens?|What is shown?|A kite flies.|Reply to: What happens?|Reply to: What is shown?"
    assert len(told) == 2 and set(recorder.requests[0]) == {"model", "messages"}

    (file,) = benchmark.export(run, tmp_path)
    expected = FIXTURES / "video_generative" / "expected_answers_consistency_qa.jsonl"
    assert file.read_text() == expected.read_text()
    rows = [benchmark.answer_row(a.record, a.reply) for a in run.answers]
    for i, (a, row) in enumerate(zip(run.answers, rows)):
        assert benchmark.reply_of(row) == a.reply
        assert [belongs(benchmark, other.record, row) for other in run.answers] == [i == j for j in range(4)]


def test_consistency_needs_both_answers(entries, tmp_path):
    recorder = Recorder(["{'score': 4}"])
    score = CONSISTENCY.score(run_of(CONSISTENCY, entries, ["a", None, "c", "d"], judge(tmp_path, recorder)))
    assert score.headline == 2 and score.right == [0, 0, 0.8, 0.8] and len(recorder.requests) == 1


def test_published_figures():
    assert {b.name: b.published["LLaVA-Mini"] for b in video_qa.BENCHMARKS} == {
        "msvd_qa": 70.9,
        "msrvtt_qa": 59.5,
        "activitynet_qa": 53.5,
        "videochatgpt_correctness": 2.97,
        "videochatgpt_detail": 2.99,
        "videochatgpt_context": 3.61,
        "videochatgpt_temporal": 2.48,
        "videochatgpt_consistency": 2.67,
    }
    assert all(b.judged for b in video_qa.BENCHMARKS)


@pytest.mark.parametrize("benchmark", ASPECTS, ids=names)
def test_a_judge_is_needed(benchmark, entries):
    records = benchmark.records(entries)
    with pytest.raises(UserError, match="name the judge"):
        benchmark.score(Run(entries, [Answered(r, "x") for r in records]))

"""`lmm eval score` of what an LLM judges, against a real HTTP server; published messages come from a file."""

import csv
import io
import json
import shutil

import pytest
from eval_fixtures import GOLDEN, Place, golden, lines, write_lines
from evaluation.judge_server import fails, judges, says, serving
from evaluation.judging import Recorder, write

KEY = "sk-made-up-0123456789abcdef"
ELIDED = "(text not kept)"
PAIR = {"system": ELIDED, "user": "{question}|{answer}|{pred}"}
ASPECTS = ("correctness", "detail", "context", "temporal", "consistency")
BENCH_CALLS = golden("llavabench/expected_judge_calls.json")
WORDS = {  # as a user would give the published messages, as far as the fixtures show them
    "name": "as published",
    **{f"videochatgpt_{aspect}": PAIR for aspect in ASPECTS},
    "videochatgpt_consistency": {"system": ELIDED, "user": "{question1}|{question2}|{answer}|{pred1}|{pred2}"},
    "video_qa": PAIR,
    "llava_bench": {
        "system": BENCH_CALLS[0]["messages"][0]["content"],
        "user": "{context}|{question}|{reference}|{candidate}|{rule}",
        **{f"rule_{category}": category for category in ("conv", "detail", "complex")},
    },
    "mm_vet": {"examples": "examples\n"},
    "msvd_msrvtt": {"instruction": "{question}"},
    "activitynet_qa": {"instruction": "{question}"},
}


@pytest.fixture
def place(tmp_path, capsys, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return Place(tmp_path, capsys)


@pytest.fixture
def judge():
    with serving() as server:
        yield server


@pytest.fixture
def words(judge, tmp_path):
    """A judge, its key, published messages."""
    write(tmp_path / "words.json", WORDS)
    told = ["--judge", "made-up", "--judge-url", judge.base, "--judge-key", "JUDGE_KEY"]
    return [*told, "--wording", tmp_path / "words.json"]


def lay_bench(root):
    shutil.copytree(GOLDEN / "llavabench", root / "llava-bench-in-the-wild")
    return GOLDEN / "llavabench" / "answers.jsonl"


def lay_vet(root):
    truth = golden("mmvet_judge/mm-vet.json")
    write(root / "mm-vet" / "mm-vet.json", truth)
    questions = [{"question_id": int(n[3:]), "image": e["imagename"], "text": e["question"]} for n, e in truth.items()]
    write_lines(root / "mm-vet" / "llava-mm-vet.jsonl", questions)
    replies = golden("mmvet_judge/results.json")
    write_lines(root / "vet.jsonl", [{"question_id": int(name[3:]), "text": text} for name, text in replies.items()])
    return root / "vet.jsonl"


def lay_qa(root, folder):
    rows = lines("video_qa/pred.jsonl")
    write(
        root / folder / "test_q.json", [{"video_name": "c", "question": r["question"], "question_id": r["id"]} for r in rows]
    )
    write(root / folder / "test_a.json", [{"answer": r["answer"], "question_id": r["id"]} for r in rows])
    return GOLDEN / "video_qa" / "pred.jsonl"


def lay_aspects(root):
    """The video that is missing is in no file: the published script passes over it."""
    entries = [entry for entry in golden("video_generative/generic_qa.json") if entry["video_name"] != "v_missing"]
    for name in ("generic_qa", "temporal_qa"):
        write(root / "benchmarking" / "Benchmarking_QA" / f"{name}.json", entries)
    write(root / "benchmarking" / "Benchmarking_QA" / "consistency_qa.json", golden("video_generative/consistency_qa.json"))


def sent(judge):
    return [request["body"] for request in judge.requests]


def vet_judge():
    """The fixture's replies: to the last question first none that can be read, then one to the message that insists."""
    replies = golden("mmvet_judge/expected.json")["judge_replies_in_order"]
    questions = ["x is 1 | ", "Zoë | ", "So. | ", "On the left | ", "(digit): ", "STOP | "]
    return Recorder(dict(zip(questions, [*replies[:4], replies[5], replies[4]])))


# ---- the published numbers


@pytest.mark.parametrize("name, folder", [("msvd_qa", "MSVD"), ("msrvtt_qa", "MSRVTT"), ("activitynet_qa", "ActivityNet")])
def test_video_qa(place, judge, words, name, folder):
    expected = golden("video_qa/expected_judge.json")
    answers = lay_qa(place.root, f"{folder}_Zero_Shot_QA")
    judge.script[:] = [judges(Recorder({f"what is {i}?": expected["judge_replies"][f"q{i}"] for i in range(6)}))]
    found = place.score(name, answers, *words)
    printed = dict(line.split(": ") for line in expected["printout"])
    assert found["headline"] == found["figures"]["accuracy"] == 100 * float(printed["Accuracy"])
    assert found["figures"]["score"] == float(printed["Average score"])
    assert len(judge.requests) == expected["calls_made"]
    calls = [body for body in sent(judge) if body["messages"][1]["content"] == "what is 0?|cat|a cat"]
    calls[0]["messages"][1]["content"] = ELIDED
    assert calls == [expected["first_judge_call"] | {"model": "made-up"}]
    assert any("1 not judged, left out" in note for note in found["notes"])


@pytest.mark.parametrize("aspect", ASPECTS)
def test_aspects(place, judge, words, aspect):
    lay_aspects(place.root)
    kind = "consistency_qa" if aspect == "consistency" else "generic_qa"
    replies = ["{'score': 4.8}", "{'score': '2'}", '{"score": 3}']
    judge.script[:] = [says(reply) for reply in (["{'score': 5}", "{'score': 2.9}"] if aspect == "consistency" else replies)]
    answers = GOLDEN / "video_generative" / f"expected_answers_{kind}.jsonl"
    found = place.score(f"videochatgpt_{aspect}", answers, *words)
    expected = golden("video_generative/expected_judge.json")[aspect]
    assert f"Average score for correctness: {found['headline']}" == expected["printout"]
    assert len(judge.requests) == len(expected["record_keys"])
    assert set(sent(judge)[0]) == {"model", "messages"}, "the temperature is not sent"
    assert sent(judge)[0]["messages"][0] == {"role": "system", "content": ELIDED}
    if aspect == "consistency":
        (file,), _ = place.export("videochatgpt_consistency", answers)
        assert file.read_text() == answers.read_text()


def test_the_video_that_is_missing_counts_as_0(place, judge, words):
    lay_aspects(place.root)
    write(place.root / "benchmarking" / "Benchmarking_QA" / "generic_qa.json", golden("video_generative/generic_qa.json"))
    judge.script[:] = [says("{'score': 3}")]
    answers = GOLDEN / "video_generative" / "expected_answers_generic_qa.jsonl"
    found = place.score("videochatgpt_detail", answers, *words, "--allow-missing")
    assert found["headline"] == 9 / 4 and found["counts"] == {"records": 4, "missing": 1, "faults": 0}


def test_llava_bench(place, judge, words):
    expected = golden("llavabench/expected.json")
    candidates = [f"Candidate answer {i}." for i in range(4)]
    judge.script[:] = [judges(Recorder(dict(zip(candidates, expected["judge_replies_in_order"]))))]
    found = place.score("llava_bench", lay_bench(place.root), *words)
    printed = expected["summary_printout (columns: name, 100*candidate/reference, 10*mean reference, 10*mean candidate)"]
    for line in printed[1:-1]:
        name, *figures = line.rsplit(" ", 3)
        part = name.removeprefix("all").removeprefix("llava_bench_")
        for kind, figure in zip(("relative", "reference", "candidate"), figures):
            assert round(found["figures"][f"as published, {kind} score{f' / {part}' if part else ''}"], 1) == float(figure)
    assert found["headline"] == pytest.approx(100 * 7.25 / 9.5)  # of those that can be read, after three tries
    told = {body["messages"][1]["content"] for body in sent(judge)}
    assert "A red kite over a beach.|What is it?|Reference answer 0.|Candidate answer 0.|conv" in told and len(told) == 4
    (call,) = {json.dumps(body | {"messages": body["messages"][0]}, sort_keys=True) for body in sent(judge)}
    first = BENCH_CALLS[0] | {"model": "made-up", "messages": BENCH_CALLS[0]["messages"][0]}
    assert call == json.dumps(first, sort_keys=True)


def test_mm_vet(place, judge, words):
    judge.script[:] = [judges(vet_judge())]
    found = place.score("mm_vet", lay_vet(place.root), *words)
    expected = golden("mmvet_judge/expected.json")
    header, values = csv.reader(io.StringIO(expected["capability_csv"]))
    figures = dict(zip(header, values))
    assert round(found["headline"], 1) == float(figures["total"]) == 74.0
    for name in ("rec", "ocr", "know", "math", "spat"):
        assert round(found["figures"][f"capability / {name}"], 1) == float(figures[name])
    header, values = csv.reader(io.StringIO(expected["capability_integration_csv"]))
    for names, value in list(zip(header, values))[1:5]:
        assert round(found["figures"][f"capabilities / {' + '.join(sorted(names.split('_')))}"], 1) == float(value)
    calls = [body | {"last_lines": body.pop("messages")[0]["content"].split("\n")[-2:]} for body in sent(judge)]
    published = [call | {"model": "made-up"} for call in golden("mmvet_judge/expected_judge_calls.json")]
    assert sorted(calls, key=json.dumps) == sorted(({n: c[n] for n in calls[0]} for c in published), key=json.dumps)


# ---- what is kept, what it costs, and refusals


def test_what_scores_hold_of_the_judge(place, judge, words):
    judge.script[:] = [judges(vet_judge())]
    answers = lay_vet(place.root)
    published = place.score("mm_vet", answers, *words)["judge"]
    assert (published["model"], published["served"]) == ("made-up", ["judge-0001"])
    assert published["wording"]["name"] == "as published" and len(published["wording"]["digest"]) == 16
    ours = place.score("mm_vet", answers, *words[:-2])["judge"]
    assert ours["wording"]["name"] == "lmm-jax" and ours["wording"]["digest"] != published["wording"]["digest"]
    assert {request["headers"]["Authorization"] for request in judge.requests} == {f"Bearer {KEY}"}
    assert not [file for file in place.run.rglob("*") if file.is_file() and KEY in file.read_text()]


def test_a_second_scoring_asks_nothing(place, judge, words):
    judge.script[:] = [judges(vet_judge())]
    answers = lay_vet(place.root)
    first = place.score("mm_vet", answers, *words)
    asked = len(judge.requests)
    judge.script[:] = [fails(500)]
    status, _, err = place.part("score", "mm_vet", *words, answers=answers)
    assert status == 0 and err == "judge: 0 calls, 6 from disk, 0 failed, cost 0.0000\n"
    assert json.loads((place.run / "mm_vet" / "scores.json").read_text()) == first
    assert len(judge.requests) == asked == 6


def test_cost_is_shown_and_runs_are_averaged(place, judge, words):
    judge.script[:] = [says("0.5", prompt_tokens=1000, completion_tokens=10)]
    more = ["--judge-runs", "2", "--judge-prices", "30", "60"]
    status, out, err = place.part("score", "mm_vet", *words, *more, answers=lay_vet(place.root))
    assert status == 0 and out.startswith("MM-Vet: 50.00")
    assert err == f"judge: 10 calls, 0 from disk, 0 failed, cost {10 * (30_000 + 600) / 1e6:.4f}\n"


def test_no_judge(place):
    answers = lay_vet(place.root)
    assert "name the judge" in place.refused("score", "mm_vet", "--data", place.root, "--out", place.run, "--answers", answers)


@pytest.mark.parametrize(
    "script, said",
    [
        (fails(401), "the judge at {base} wants a key, and that in JUDGE_KEY was refused (HTTP 401: no)"),
        (fails(404), "there is no judge at {base}, or no such model"),
        (fails(400), "nothing could be judged"),
    ],
)
def test_judges_that_refuse(place, judge, words, script, said):
    judge.script[:] = [script]
    status, out, err = place.part("score", "mm_vet", *words, answers=lay_vet(place.root))
    *shown, error = err.splitlines()
    assert (status, out) == (2, "") and error.startswith("error: ") and said.format(base=judge.base) in error
    assert all(line.startswith("judge: ") for line in shown) and len(shown) == 1
    assert KEY not in err and not (place.run / "mm_vet" / "scores.json").exists()


def test_a_wording_that_lacks_a_section(place, judge, words, tmp_path):
    write(tmp_path / "words.json", {"name": "short"})
    answers = lay_vet(place.root)
    err = place.refused("score", "mm_vet", "--data", place.root, "--out", place.run, "--answers", answers, *words)
    assert "the wording 'short' has no 'mm_vet'" in err and judge.requests == []


def test_a_table_tells_who_judged(place, judge, words):
    judge.script[:] = [says("0.5")]
    place.score("mm_vet", lay_vet(place.root), *words)
    status, out, _ = place.call("table", place.run)
    assert status == 0 and "made-up (served as judge-0001), wording as published" in out

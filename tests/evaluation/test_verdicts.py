"""What judges' replies say, and asking again."""

import json

import pytest
from evaluation.judging import FIXTURES, canned, read

from lmm_jax.errors import UserError
from lmm_jax.evaluation.judge import TryAgainError
from lmm_jax.evaluation.verdicts import (
    Verdict,
    answer_and_score,
    correctness,
    dictionary,
    judge_of,
    problems,
    score_of,
    score_pair,
    settle,
    settle_all,
)

ASKED = [{"role": "user", "content": "How right is it?"}]


@pytest.mark.parametrize("case", read(FIXTURES / "llavabench" / "parse_score.json"))
def test_pairs_of_scores_are_read_as_published(case):
    expected = case["scores"]
    assert (score_pair(case["review"]) or (-1, -1)) == tuple(expected)


@pytest.mark.parametrize("reply", ["nan 5", "inf 3", "-1 -1", "9 60"])
def test_scores_beyond_their_scale_are_none(reply):
    assert score_pair(reply) is None


@pytest.mark.parametrize(
    "reply, number",
    [("0.5", 0.5), ("1.0 | x", 1.0), ("0\n", 0.0), ("one", None), ("1.1", None), ("-0.1", None), ("nan", None), ("", None)]
    + [(" 0.5", None), ("0.5\nas", None)],
)
def test_grades_are_read_as_published(reply, number):
    assert correctness(reply) == number


@pytest.mark.parametrize(
    "reply, score",
    [
        ("{'score': 4}", 4),
        ("{'score': 4.8}", 4),
        ("{'score': '2'}", 2),
        ('{"score": 3}', 3),
        ('{"score": "4.9"}', 4),
        ('Here it is:\n```json\n{"score": 0}\n```', 0),
        ("The dictionary: {'score': 5}. Done {'score': 1}", 5),
        ("{score: 3}", 3),
        ("Score: 4", 4),
        ("{'score': 3", 3),
        ("{'score': 6}", None),
        ("{'score': -1}", None),
        ("{'score': True}", None),
        ("{'score': None}", None),
        ("{'score': [4]}", None),
        ("{'score': float('nan')}", None),
        ('{"score": NaN}', None),
        ('{"score": 1e999}', None),
        ("{'score': 0x" + "f" * 8000 + "}", None),
        ("[" * 9000, None),
        ("{" * 9000, None),
        ("{'score': " + "-" * 9000 + "1}", None),
        ("\0", None),
        ("4", None),
        ("Sorry, I cannot.", None),
        ("", None),
    ],
)
def test_scores_of_dictionaries(reply, score):
    assert score_of(reply) == score


@pytest.mark.parametrize(
    "reply, said",
    [
        ("{'pred': 'yes', 'score': 5}", (True, 5)),
        ("{'pred': 'No', 'score': '2'}", (False, 2)),
        ("{'pred': 'maybe', 'score': 3}", (None, 3)),
        ("{'pred': 'Yes.', 'score': 4.8}", (True, 4)),
        ("pred: no, score: 1", (False, 1)),
        ("{'score': 5}", None),
        ("{'pred': 'yes'}", None),
        ("yes", None),
    ],
)
def test_answers_with_scores(reply, said):
    assert answer_and_score(reply) == said


def test_nothing_in_a_reply_is_executed(tmp_path):
    trap = tmp_path / "trap"
    for code in (f"open({str(trap)!r}, 'w')", f"__import__('pathlib').Path({str(trap)!r}).touch()"):
        for reply in (code, f"{{'score': {code}}}", f"{{'score': 4, 'x': {code}}}", f"{{'pred': {code}, 'score': 4}}"):
            dictionary(reply), score_of(reply), answer_and_score(reply), score_pair(reply), correctness(reply)
    assert not trap.exists()


# ---- asking again


def test_asking_again_until_a_reply_can_be_read(tmp_path):
    replies = iter(["one", "two", "0.3"])
    judge = canned(tmp_path / "c", lambda request: next(replies))
    tries = [(ASKED, 0.0)] * 5
    assert settle(judge, tries, correctness) == Verdict(0.3)
    lines = [json.loads(line) for line in (tmp_path / "c").read_text().splitlines()]
    assert [(line["attempt"], line["text"]) for line in lines] == [(0, "one"), (1, "two"), (2, "0.3")]
    assert settle(canned(tmp_path / "c", lambda request: "x"), tries, correctness) == Verdict(0.3), "replies are kept"


def test_asking_again_has_an_end(tmp_path):
    judge = canned(tmp_path / "c", lambda request: "no idea")
    verdict = settle(judge, [(ASKED, None)] * 4, score_of, first=8)
    assert verdict.value is None and "could not be read, 4 times" in verdict.problem
    assert judge.usage.calls == 4


def test_nothing_is_worth_nothing(tmp_path):
    def down(request):
        raise TryAgainError("down", outage=False)

    judge = canned(tmp_path / "c", down)
    with pytest.raises(UserError, match="nothing could be judged.*down"):
        settle_all(judge, lambda i: settle(judge, [(ASKED, float(i))], score_of), [1, 2])
    assert settle_all(judge, lambda i: settle(judge, [(ASKED, None)], score_of), []) == []
    with pytest.raises(UserError, match="name the judge"):
        judge_of(None)


def test_problems_are_few_sentences():
    verdicts = {i: Verdict(None, "unreadable") for i in range(30)} | {100 + i: Verdict(None, f"id {i}") for i in range(9)}
    notes = problems(verdicts | {"fine": Verdict(1)}, "left out")
    assert notes[0].startswith("30 not judged, left out: unreadable (records 0, 1, 2,") and notes[0].endswith("19, ...)")
    assert len(notes) == 4 and notes[-1].startswith("7 not judged")
    assert problems({"fine": Verdict(1)}, "left out") == []

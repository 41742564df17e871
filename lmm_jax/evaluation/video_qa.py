"""Video benchmarks whose answers an LLM judges: MSVD-QA, MSRVTT-QA, ActivityNet-QA, Video-ChatGPT (evaluation spec 5.1, 5.2).

Questions and answers are joined by id. Three of Video-ChatGPT's aspects are about the same answers: these benchmarks have the
same `records`, so one run answers them all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmm_jax.evaluation.benchmark import Answered, Benchmark, Record, Row, Run, Score, one_line
from lmm_jax.evaluation.judge import Message
from lmm_jax.evaluation.reading import SCRIPT_TOKENS, check_new, look_up, mean_percent, ratio
from lmm_jax.evaluation.verdicts import TOP, Verdict, answer_and_score, judge_of, problems, score_of, settle, settle_all
from lmm_jax.evaluation.video import LLAVA_MINI, entries
from lmm_jax.evaluation.wording import Wording, own

T = TypeVar("T")

_TRIES = 10  # times a verdict is asked for, as often as the published script of video QA does


@dataclasses.dataclass(frozen=True)
class Asked:
    """One thing to judge: the answers it is about (one, or a pair), and what the judge is told."""

    answers: tuple[Answered, ...]
    messages: Callable[[], list[Message]]

    @property
    def key(self) -> int:
        """That of the first answer."""
        return self.answers[0].record.key

    @property
    def whole(self) -> bool:
        """Whether all answers are there."""
        return not any(a.fault for a in self.answers)


def _judge(
    run: Run, asked: Sequence[Asked], read: Callable[[str], T | None], temperature: float | None
) -> dict[int, Verdict[T]]:
    """Key -> verdict, of the answers that are there."""
    judge = judge_of(run.judge)
    whole = {one.key: [(one.messages(), temperature)] * _TRIES for one in asked if one.whole}
    verdicts = settle_all(judge, lambda tries: settle(judge, tries, read), list(whole.values()))
    return dict(zip(whole, verdicts))


# ---- MSVD-QA, MSRVTT-QA, ActivityNet-QA


@dataclasses.dataclass(frozen=True)
class _Set:
    """A set of questions.

    Attributes:
      videos, prefix: where its videos lie, and what their names begin with.
      instruction: what goes before questions.
      accuracy, score: LLaVA-Mini's.
      size: how many questions there are, where that is known.
    """

    name: str
    title: str
    videos: str
    prefix: str
    instruction: str
    accuracy: float
    score: float
    size: int | None = None


_SETS = (
    _Set("msvd_qa", "MSVD", "videos", "", "msvd_msrvtt", 70.9, 4.0),
    _Set("msrvtt_qa", "MSRVTT", "videos/all", "", "msvd_msrvtt", 59.5, 3.6),
    _Set("activitynet_qa", "ActivityNet", "test_videos", "v_", "activitynet_qa", 53.5, 3.5, size=8_000),
)


def _qa_records(folder: Path, chosen: _Set, wording: Wording) -> list[Record]:
    questions, truth = folder / "test_q.json", folder / "test_a.json"
    name = {"question_id": (str, int)}
    answers, known = {}, set()
    for number, entry in enumerate(entries(truth, name | {"answer": (str, int, float)}), 1):
        check_new(str(entry["question_id"]), known, f"entry {number} of {truth}")
        answers[str(entry["question_id"])] = entry["answer"]
    records, seen = [], set()
    for key, entry in enumerate(entries(questions, name | {"video_name": str, "question": str})):
        check_new(str(entry["question_id"]), seen, f"entry {key + 1} of {questions}")
        row = {"id": entry["question_id"], "question": entry["question"]}
        row["answer"] = look_up(answers, str(entry["question_id"]), truth)
        text = wording.text(chosen.instruction, "instruction", question=entry["question"])
        video = str(folder / chosen.videos / f"{chosen.prefix}{entry['video_name']}")
        records.append(Record(key, text, video=video, row=row))
    return records


def _qa_score(run: Run, wording: Wording) -> Score:
    """Accuracy over verdicts of yes and no, mean score over all verdicts; answers that are not there are wrong in both."""

    def messages(a: Answered) -> list[Message]:
        row = a.record.row
        return wording.messages("video_qa", question=row["question"], answer=str(row["answer"]), pred=a.reply)

    asked = [Asked((a,), functools.partial(messages, a)) for a in run.answers]
    verdicts = _judge(run, asked, answer_and_score, 0.0)
    notes = problems(verdicts, "left out")
    said = [(False, 0) if a.fault else verdicts[a.record.key].value for a in run.answers]
    right = [None if one is None or one[0] is None else float(one[0]) for one in said]
    scores = [one[1] for one in said if one is not None]
    if undecided := right.count(None) - said.count(None):
        notes.append(f"the judge said neither yes nor no to {undecided}: these count for the score only")
    figures = {"accuracy": mean_percent([hit for hit in right if hit is not None], "accuracy", notes)}
    figures["score"] = ratio(math.fsum(scores), len(scores), "score", notes)
    return Score(figures["accuracy"], figures, right, notes, [one_line(a.record.row["answer"]) for a in run.answers])


def _qa_benchmark(chosen: _Set, wording: Wording) -> Benchmark:
    return Benchmark(
        name=chosen.name,
        title=f"{chosen.title}-QA",
        folder=f"{chosen.title}_Zero_Shot_QA",
        records=functools.partial(_qa_records, chosen=chosen, wording=wording),
        max_new_tokens=SCRIPT_TOKENS,
        headline="accuracy, %",
        answer_row=_pred_row,
        reply_of=_pred,
        identity=lambda row: str(row.get("id")),
        score=functools.partial(_qa_score, wording=wording),
        judged=True,
        published={LLAVA_MINI: chosen.accuracy},
        published_figures={LLAVA_MINI: {"score": chosen.score}},
        size=chosen.size,
    )


# ---- Video-ChatGPT


def _records(folder: Path, file: str, questions: Sequence[str]) -> list[Record]:
    """A record for each question of each entry."""
    kinds = dict.fromkeys([*questions, "A", "video_name"], str)
    asked = [(entry, entry[name]) for entry in entries(folder / "Benchmarking_QA" / file, kinds) for name in questions]
    videos = folder / "Test_Videos"
    return [Record(key, text, video=str(videos / entry["video_name"]), row=entry) for key, (entry, text) in enumerate(asked)]


def _generic_records(folder: Path) -> list[Record]:
    return _records(folder, "generic_qa.json", ["Q"])


def _temporal_records(folder: Path) -> list[Record]:
    return _records(folder, "temporal_qa.json", ["Q"])


def _consistency_records(folder: Path) -> list[Record]:
    """Two for each entry, one after the other."""
    return _records(folder, "consistency_qa.json", ["Q1", "Q2"])


def _pred_row(record: Record, reply: str) -> Row:
    return record.row | {"pred": reply}


def _pred(row: Row) -> str:
    return row["pred"]


def _consistency_row(record: Record, reply: str) -> Row:
    return record.row | {_pred_name(record): reply}


def _consistency_rows(row: Row) -> list[Row]:
    """A published line holds both replies."""
    if "pred1" not in row or "pred2" not in row:
        return [row]
    return [{name: value for name, value in row.items() if name != other} for other in ("pred2", "pred1")]


def _pred_name(record: Record) -> str:
    return f"pred{1 + record.key % 2}"


def _consistency_export(run: Run, out: Path) -> list[Path]:
    """The published answers file: both replies of an entry in a line."""
    replies = ["" if a.fault else a.reply for a in run.answers]
    rows = [a.record.row | {"pred1": one, "pred2": two} for a, one, two in zip(run.answers[::2], replies[::2], replies[1::2])]
    file = out / "consistency_qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [file]


def _aspect_asked(run: Run, section: str, wording: Wording) -> list[Asked]:
    def messages(a: Answered) -> list[Message]:
        return wording.messages(section, question=a.record.text, answer=a.record.row["A"], pred=a.reply)

    return [Asked((a,), functools.partial(messages, a)) for a in run.answers]


def _consistency_asked(run: Run, section: str, wording: Wording) -> list[Asked]:
    """The published script sends the first question twice; its authors have mended that, and so it is here."""

    def messages(a: Answered, b: Answered) -> list[Message]:
        texts = {"question1": a.record.text, "question2": b.record.text, "pred1": a.reply, "pred2": b.reply}
        return wording.messages(section, answer=a.record.row["A"], **texts)

    pairs = zip(run.answers[::2], run.answers[1::2])
    return [Asked(pair, functools.partial(messages, *pair)) for pair in pairs]


def _aspect_score(run: Run, section: str, wording: Wording) -> Score:
    """The mean of scores from 0 to 5; answers that are not there get 0."""
    gather = _consistency_asked if section.endswith("consistency") else _aspect_asked
    asked = gather(run, section, wording)
    verdicts = _judge(run, asked, score_of, None)
    notes = problems(verdicts, "left out")
    scores = [verdicts[one.key].value if one.whole else 0 for one in asked]
    counted = [score for score in scores if score is not None]
    mean = ratio(math.fsum(counted), len(counted), "score", notes)
    right = [None if score is None else score / TOP for one, score in zip(asked, scores) for _ in one.answers]
    expected = [one_line(a.record.row["A"]) for a in run.answers]
    return Score(mean, {"score": mean}, right, notes, expected)


def _aspect(
    name: str, records: Callable[[Path], list[Record]], published: float, wording: Wording, **others: Any
) -> Benchmark:
    row: dict[str, Any] = {"answer_row": _pred_row, "reply_of": _pred, "identity": _entry}
    return Benchmark(
        name=f"videochatgpt_{name}",
        title=f"Video-ChatGPT {name}",
        folder="benchmarking",
        records=records,
        max_new_tokens=SCRIPT_TOKENS,
        headline=f"score, 0 to {TOP}",
        score=functools.partial(_aspect_score, section=f"videochatgpt_{name}", wording=wording),
        judged=True,
        published={LLAVA_MINI: published},
        **row | others,
    )


def _entry(row: Row) -> Hashable:
    return tuple(row.get(name) for name in ("video_name", "Q", "Q1", "Q2", "A"))


# ---- the table


def benchmarks(wording: Wording) -> tuple[Benchmark, ...]:
    """The benchmarks, asked and judged in these words."""
    pairs: dict[str, Any] = {
        "answer_row": _consistency_row,
        "rows_of": _consistency_rows,
        "reply_of": lambda row: row["pred1"] if "pred1" in row else row["pred2"],
        "identity": lambda row: ("pred1" in row, "pred2" in row, _entry(row)),
        "export": _consistency_export,
    }
    return (
        *(_qa_benchmark(chosen, wording) for chosen in _SETS),
        _aspect("correctness", _generic_records, 2.97, wording, answers="videochatgpt_generic"),
        _aspect("detail", _generic_records, 2.99, wording, answers="videochatgpt_generic"),
        _aspect("context", _generic_records, 3.61, wording, answers="videochatgpt_generic"),
        _aspect("temporal", _temporal_records, 2.48, wording),
        _aspect("consistency", _consistency_records, 2.67, wording, **pairs),
    )


BENCHMARKS = benchmarks(own())

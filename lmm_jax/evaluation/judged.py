"""Image benchmarks whose answers an LLM judges: LLaVA-Bench-in-the-Wild and MM-Vet (evaluation spec 4.11, 4.12).

Everything is joined by ids. Judging may be repeated (`Judge.runs`): figures are means over the runs, as published ones are.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Answered, Benchmark, Record, Run, Score, one_line, read_lines
from lmm_jax.evaluation.judge import Judge, Message
from lmm_jax.evaluation.reading import (
    SCRIPT_TOKENS,
    answer_row,
    check_fields,
    check_new,
    llava_records,
    look_up,
    mean_percent,
    published,
    ratio,
    read_object,
)
from lmm_jax.evaluation.verdicts import TOP_OF_PAIR, Verdict, correctness, judge_of, problems, score_pair, settle, settle_all
from lmm_jax.evaluation.wording import Wording, own

Pair = tuple[float, float]  # scores of the reference answer and of the candidate
Tries = Sequence[tuple[list[Message], float]]  # messages and temperature of each attempt
T = TypeVar("T")

_CATEGORIES = ("conv", "detail", "complex")
_PAIR_TRIES = 3  # times a pair of scores is asked for
_GRADE_TRIES = 5  # times a grade is asked for; the published script asks a sixth time and gives 0 whatever comes
_NOTHING: Pair = (TOP_OF_PAIR, 0.0)  # of an answer that is not there
_UNREADABLE: Pair = (-1.0, -1.0)  # what the published script averages in for scores it cannot read


def _verdicts(
    judge: Judge, asked: Mapping[int, Tries], read: Callable[[str], T | None], max_tokens: int, run: int
) -> dict[int, Verdict[T]]:
    """Key -> verdict; each run of judging has attempts of its own."""

    def one(tries: Tries) -> Verdict[T]:
        return settle(judge, tries, read, max_tokens=max_tokens, first=run * len(tries))

    return dict(zip(asked, settle_all(judge, one, list(asked.values()))))


# ---- LLaVA-Bench


def _bench_records(folder: Path) -> list[Record]:
    return llava_records(folder / "questions.jsonl", folder / "images")


def _by_field(file: Path, field: str, kinds: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """Lines of a file by one of their fields, which must differ."""
    found, seen = {}, set()
    for number, row in enumerate(read_lines(file), 1):
        where = f"line {number} of {file}"
        check_fields(row, kinds, where)
        check_new(row[field], seen, where)
        found[row[field]] = row
    return found


class _Comparing:
    """What LLaVA-Bench's judge is told about each answer."""

    def __init__(self, folder: Path, wording: Wording) -> None:
        files = [folder / name for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")]
        self._questions = _by_field(files[0], "question_id", {"question_id": (int, str), "category": str, "image": str})
        self._context = _by_field(files[1], "image", {"image": str, "caption": (str, list)})
        self._references = _by_field(files[2], "question_id", {"question_id": (int, str), "text": str})
        self._files, self._wording = files, wording

    def category(self, a: Answered) -> str:
        """conv, detail or complex."""
        category = look_up(self._questions, a.record.row["question_id"], self._files[0])["category"]
        if category not in _CATEGORIES:
            raise UserError(f"{self._files[0]} has a category {category!r:.40}: expected one of {', '.join(_CATEGORIES)}")
        return category

    def expected(self, a: Answered) -> str | None:
        """The reference answer."""
        reference = self._references.get(a.record.row["question_id"])
        return one_line(reference["text"]) if reference else None

    def messages(self, a: Answered) -> list[Message]:
        """The reference answer stands first."""
        name = a.record.row["question_id"]
        caption = look_up(self._context, self._questions[name]["image"], self._files[1])["caption"]
        return self._wording.messages(
            "llava_bench",
            context=caption if isinstance(caption, str) else "\n".join(map(str, caption)),
            question=a.record.text,
            reference=look_up(self._references, name, self._files[2])["text"],
            candidate=a.reply,
            rule=self._wording.text("llava_bench", f"rule_{self.category(a)}"),
        )


def _bench_score(run: Run, wording: Wording) -> Score:
    """Scores of the candidate by those of the reference answers.

    Answers whose scores cannot be read are left out; "as published" counts them as -1 to -1. An answer that is not there
    gets 0, and its reference the highest score.
    """
    judge, comparing, notes = judge_of(run.judge), _Comparing(run.folder, wording), []
    categories = [comparing.category(a) for a in run.answers]
    asked = {a.record.key: [(comparing.messages(a), 0.2)] * _PAIR_TRIES for a in run.answers if not a.fault}
    figures, right = defaultdict(list), defaultdict(list)
    for number in range(judge.runs):
        verdicts = _verdicts(judge, asked, score_pair, 1024, number)
        notes += problems(verdicts, "left out")
        pairs = [_NOTHING if a.fault else verdicts[a.record.key].value for a in run.answers]
        for name, figure in _relative(pairs, categories, notes).items():
            figures[name].append(figure)
        for a, pair in zip(run.answers, pairs):
            right[a.record.key] += [] if pair is None else [pair[1] / TOP_OF_PAIR]
    means = {name: statistics.fmean(values) for name, values in figures.items()}
    hits = [statistics.fmean(right[a.record.key]) if right[a.record.key] else None for a in run.answers]
    expected = list(map(comparing.expected, run.answers))
    return Score(means["relative score"], means, hits, list(dict.fromkeys(notes)), expected)


def _relative(pairs: Sequence[Pair | None], categories: Sequence[str], notes: list[str]) -> dict[str, float]:
    """For all and for each category: 100 * candidate / reference, and ten times both; twice, see `_bench_score`."""
    figures = {}
    for prefix, unread in (("", None), ("as published, ", _UNREADABLE)):
        for part in ("", *_CATEGORIES):
            chosen = [pair or unread for pair, category in zip(pairs, categories) if part in ("", category)]
            chosen = [pair for pair in chosen if pair]
            what = f" / {part}" if part else ""
            count = len(chosen) or 1
            first, second = (round(math.fsum(pair[i] for pair in chosen) / count, 3) for i in (0, 1))
            figures[f"{prefix}relative score{what}"] = 100 * ratio(second, first, f"{prefix}relative score{what}", notes)
            figures[f"{prefix}reference score{what}"] = 10 * first
            figures[f"{prefix}candidate score{what}"] = 10 * second
    return figures


# ---- MM-Vet


def _vet_records(folder: Path) -> list[Record]:
    return llava_records(folder / "llava-mm-vet.jsonl", folder / "images")


def _vet_name(a: Answered) -> str:
    return f"v1_{a.record.row['question_id']}"


def _vet_export(run: Run, out: Path) -> list[Path]:
    """The replies as MM-Vet's own evaluator reads them; "" where there is none."""
    file = out / "mm-vet.json"
    replies = {_vet_name(a): "" if a.fault else a.reply for a in run.answers}
    file.write_text(json.dumps(replies, indent=2), "utf-8")
    return [file]


def _vet_answer(truth: Mapping[str, Any]) -> str:
    """What must be said, with <AND> between parts and <OR> between alternatives."""
    return truth["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")


def _vet_tries(truth: Mapping[str, Any], reply: str, wording: Wording) -> Tries:
    """One message; where its reply is no number, one that asks for it, ever warmer."""
    text = f"{wording.text('mm_vet', 'examples')}\n{truth['question']} | {_vet_answer(truth)} | {reply} | "
    endings = ("", "\nPredict the correctness of the answer (digit): ")
    plain, pressing = ([{"role": "user", "content": text + ending}] for ending in endings)
    return [(plain, 0.0), *((pressing, 0.5 * i) for i in range(_GRADE_TRIES - 1))]


def _vet_score(run: Run, wording: Wording) -> Score:
    """Grades from 0 to 1, over all and over the questions that need a capability, or just a set of them."""
    judge, file = judge_of(run.judge), run.folder / "mm-vet.json"
    truth, notes = read_object(file), []
    wanted = {a.record.key: look_up(truth, _vet_name(a), file) for a in run.answers}
    for key, entry in wanted.items():
        check_fields(entry, {"question": str, "answer": str, "capability": list}, f"question {key + 1} of {file}")
    asked = {a.record.key: _vet_tries(wanted[a.record.key], a.reply, wording) for a in run.answers if not a.fault}
    runs = []
    for number in range(judge.runs):
        verdicts = _verdicts(judge, asked, correctness, 3, number)
        notes += problems(verdicts, "counted as 0")
        runs.append([0.0 if a.fault else verdicts[a.record.key].value or 0.0 for a in run.answers])
    grades = [statistics.fmean(values) for values in zip(*runs)]
    parts = defaultdict(list)
    for a, grade in zip(run.answers, grades):
        capabilities = sorted(set(map(str, wanted[a.record.key]["capability"])))
        for part in [f"capability / {c}" for c in capabilities] + [f"capabilities / {' + '.join(capabilities)}"]:
            parts[part].append(grade)
    totals = [mean_percent(values, "total", notes) for values in runs]
    figures = {"total": statistics.fmean(totals), "standard deviation of runs": statistics.pstdev(totals)}
    figures |= {part: mean_percent(values, part, notes) for part, values in sorted(parts.items())}
    expected = [one_line(_vet_answer(wanted[a.record.key])) for a in run.answers]
    return Score(figures["total"], figures, grades, list(dict.fromkeys(notes)), expected)


# ---- the table


def benchmarks(wording: Wording) -> tuple[Benchmark, ...]:
    """The benchmarks, judged in these words."""
    common = {"max_new_tokens": SCRIPT_TOKENS, "answer_row": answer_row, "judged": True}  # spec section 7, T1
    return (
        Benchmark(
            name="llava_bench",
            title="LLaVA-Bench-in-the-Wild",
            folder="llava-bench-in-the-wild",
            records=_bench_records,
            headline="score relative to the reference answers, %",
            score=functools.partial(_bench_score, wording=wording),
            published=published(65.4, 68.9, 69.3, 70.2),
            size=60,
            **common,
        ),
        Benchmark(
            name="mm_vet",
            title="MM-Vet",
            folder="mm-vet",
            records=_vet_records,
            headline="total, %",
            score=functools.partial(_vet_score, wording=wording),
            export=_vet_export,
            published=published(31.1, 36.6, 33.9, 37.2),
            size=218,
            **common,
        ),
    )


BENCHMARKS = benchmarks(own())

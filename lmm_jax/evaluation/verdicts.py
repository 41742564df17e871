"""What a judge's reply says, and asking again where it says nothing that can be read (evaluation spec section 3.7).

The readers are pure functions of strings. A reply is data: it is read by `json`, by `ast.literal_eval`, which makes no call,
or by a regular expression, and never executed.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from lmm_jax.errors import UserError
from lmm_jax.evaluation.judge import Judge, JudgeError, Message

TOP = 5  # highest score of a dictionary (evaluation spec 5.1, 5.2)
TOP_OF_PAIR = 10  # highest score of LLaVA-Bench (4.11)

T = TypeVar("T")
Item = TypeVar("Item")

_REASONS = 3  # why answers were not judged that are told one by one
_LONGEST = 10_000  # characters of a reply that are looked at
_DICTIONARY = re.compile(r"\{[^{}]*\}")
_SCORE = re.compile(r"""\bscore\b['"]?\s*[:=]\s*['"]?(\d+(?:\.\d+)?)""", re.IGNORECASE)
_PRED = re.compile(r"""\bpred\b['"]?\s*[:=]\s*['"]?(\w+)""", re.IGNORECASE)


def score_pair(reply: str) -> tuple[float, float] | None:
    """Two scores on the first line, as LLaVA-Bench's judge gives them; None where there are not two (section 4.11).

    Read as the published script reads them: "8,9" are two, "8, 9" are not.
    """
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    scores = [_number(word, TOP_OF_PAIR) for word in words]
    return None if len(scores) != 2 or None in scores else (scores[0], scores[1])


def correctness(reply: str) -> float | None:
    """A number from 0 to 1, the reply's first word, as MM-Vet's judge gives it; None where it is none (section 4.12)."""
    return _number(reply.split(" ")[0], 1)


def score_of(reply: str) -> int | None:
    """The score, 0 to 5, of a dictionary; fractions are cut off, as the published scripts do (section 5.1)."""
    return _score(dictionary(reply))


def answer_and_score(reply: str) -> tuple[bool | None, int] | None:
    """Whether a dictionary says yes, and its score, 0 to 5; the first is None where it says neither yes nor no (5.2)."""
    said = dictionary(reply)
    score = _score(said)
    if score is None or "pred" not in said:
        return None
    pred = str(said["pred"]).lower()
    return (True if "yes" in pred else False if "no" in pred else None), score


def dictionary(reply: str) -> dict[str, Any]:
    """The first dictionary in a reply, in JSON or as Python writes it; else what "score" and "pred" stand beside."""
    reply = reply[:_LONGEST]
    for text in (reply.strip(), *_DICTIONARY.findall(reply)[:1]):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
            if isinstance(found, dict):
                return found
    found = {"score": _SCORE.search(reply), "pred": _PRED.search(reply)}
    return {name: match[1] for name, match in found.items() if match}


def _score(said: dict[str, Any]) -> int | None:
    score = said.get("score")
    number = _number(score, TOP) if isinstance(score, str | int | float) and not isinstance(score, bool) else None
    return None if number is None else int(number)


def _number(text: str | float, top: float) -> float | None:
    """A number from 0 to `top`; a score beyond its scale is none."""
    try:
        number = float(text)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and 0 <= number <= top else None


@dataclasses.dataclass(frozen=True)
class Verdict(Generic[T]):
    """What a judge said of an answer: a value, or None and why there is none."""

    value: T | None
    problem: str = ""


def settle(
    judge: Judge,
    tries: Iterable[tuple[Sequence[Message], float | None]],
    read: Callable[[str], T | None],
    *,
    max_tokens: int | None = None,
    first: int = 0,
) -> Verdict[T]:
    """Asks until a reply can be read.

    Args:
      judge: is asked.
      tries: messages and temperature of each attempt.
      read: a reply -> what it says; None where it cannot be read.
      max_tokens: of a reply.
      first: number of the first attempt; other runs count from elsewhere.

    Raises:
      UserError: the judge will answer nothing.
    """
    attempts = 0
    try:
        for attempts, (messages, temperature) in enumerate(tries, 1):
            attempt = first + attempts - 1
            value = read(judge.ask(list(messages), temperature=temperature, max_tokens=max_tokens, attempt=attempt))
            if value is not None:
                return Verdict(value)
    except JudgeError as error:
        return Verdict(None, str(error))
    return Verdict(None, f"the judge's reply could not be read, {attempts} time{'s' * (attempts != 1)}")


def judge_of(judge: Judge | None) -> Judge:
    """The judge of a run.

    Raises:
      UserError: none was named.
    """
    if judge is None:
        raise UserError(
            "this benchmark's answers are judged by an LLM: name the judge's model, and its address if not OpenAI's"
        )
    return judge


def settle_all(judge: Judge, one: Callable[[Item], Verdict[T]], items: Sequence[Item]) -> list[Verdict[T]]:
    """A verdict on each item, several at once, in order.

    Raises:
      UserError: the judge will answer nothing, or there are several items and no reply to any could be had or read.
    """
    verdicts = judge.map(one, items)
    if len(verdicts) > 1 and all(v.value is None for v in verdicts):
        raise UserError(f"nothing could be judged; of the first answer: {verdicts[0].problem}")
    return verdicts


def problems(verdicts: Mapping[Any, Verdict[Any]], consequence: str) -> list[str]:
    """Sentences about the answers without a value: how many, why, which, and what became of them.

    Args:
      verdicts: by what the answer is called.
      consequence: as "left out".
    """
    found = collections.defaultdict(list)
    for name, verdict in verdicts.items():
        if verdict.problem:
            found[verdict.problem].append(str(name))
    largest = sorted(found.items(), key=lambda item: -len(item[1]))
    notes = [
        f"{len(names)} not judged, {consequence}: {problem} (records {', '.join(names[:20])}{', ...' * (len(names) > 20)})"
        for problem, names in largest[:_REASONS]
    ]
    others = sum(len(names) for _, names in largest[_REASONS:])
    return notes + [f"{others} not judged, {consequence}, for other reasons"] * bool(others)

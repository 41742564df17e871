"""What the benchmarks share: LLaVA's question files, checked look-ups, and figures that say when they divide by zero."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Record, Row, read_json, read_lines

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LOADER_TOKENS, SCRIPT_TOKENS = 128, 1024  # limits of replies in LLaVA's scripts (evaluation spec section 1.5)
PUBLISHED = ("LLaVA-v1.5-7B", "LLaVA-Mini Vicuna-7B", "LLaVA-Mini-HD Vicuna-7B", "LLaVA-Mini LLaMA-3.1-8B")


def published(*figures: float) -> dict[str, float]:
    """Figures of the models of the evaluation spec's section 6, as far as they are known, in its order."""
    return dict(zip(PUBLISHED, figures))


def llava_records(questions: Path, images: Path, identity: Sequence[str] = ("question_id",)) -> list[Record]:
    """The records of a question file of LLaVA's (evaluation spec section 1.2).

    Args:
      questions: JSON lines with question_id, image and text.
      images: the folder below which the pictures lie.
      identity: the fields that tell a record from all others; none are checked if there are none.

    Raises:
      UserError: the file is missing or malformed, or has a record twice.
    """
    records, seen = [], set()
    for key, fields in enumerate(read_lines(questions)):
        where = f"record {key + 1} of {questions}"
        check_fields(fields, {"question_id": (int, str), "image": str, "text": str}, where)
        if identity:
            check_new(tuple(fields[name] for name in identity), seen, where)
        row = {"question_id": fields["question_id"], "prompt": fields["text"]}
        records.append(Record(key, fields["text"], images=(str(images / fields["image"]),), row=row))
    return records


def answer_row(record: Record, reply: str) -> Row:
    """A line of an answers file (evaluation spec section 1.6), but for the names of the answer and of the model."""
    return record.row | {"text": reply, "metadata": {}}


def id_and_prompt(row: Row) -> Hashable:
    """The identity of a line where ids repeat: the text tells records of one id apart."""
    return row.get("question_id"), row.get("prompt")


def check_fields(entry: Any, kinds: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Raises a UserError unless an entry of a file holds these fields of these kinds; `where` names the entry."""
    for name, kind in kinds.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            held = entry.get(name) if isinstance(entry, dict) else entry
            raise UserError(f"{where} has no usable {name} ({held!r:.60}): the file is not the one that was published")


def check_new(key: Any, seen: set[Any], where: str) -> None:
    """Adds a key to those seen, or raises a UserError if it is there."""
    if key in seen:
        raise UserError(f"{where} repeats {key!r:.120}: each question must be there once")
    seen.add(key)


def look_up(truth: Mapping[Any, Any], key: Any, file: Path) -> Any:
    """What a file holds for a key, or a UserError that names both."""
    if key not in truth:
        raise UserError(f"{file} holds no answer to {key!r:.200}: it and the question file do not belong together")
    return truth[key]


def ratio(part: float, whole: float, what: str, notes: list[str]) -> float:
    """Part by whole; 0 where the whole is nothing, which a note says."""
    if whole:
        return part / whole
    notes.append(f"{what} divides by zero and is given as 0")
    return 0.0


def mean_percent(values: Collection[float], what: str, notes: list[str]) -> float:
    """The mean in percent; see `ratio`."""
    return ratio(math.fsum(values), len(values), what, notes) * 100


def note_unasked(truth: Collection[Any], asked: Collection[Any], file: Path, notes: list[str]) -> None:
    """A note where a file holds answers to questions that are not among the records."""
    if unasked := len(set(truth) - set(asked)):
        notes.append(f"{unasked} questions of {file.name} are not in the question file and are not counted")


def write_json(file: Path, value: Any) -> list[Path]:
    """Writes a file that is handed in; returns what `Benchmark.export` does."""
    file.write_text(json.dumps(value), "utf-8")
    return [file]


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      UserError: it is missing or holds something else.
    """
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object: the file is not the one that was published")
    return value

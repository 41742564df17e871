"""What a benchmark is: data. How its records are read, how its rows are written, scored and handed in.

    records(folder) ──► answered by the runner ──► Run(records, rows) ──► score ──► Score
                                                        └───────────────► export ─► files for a server

Nothing here knows of models or devices; scoring needs neither.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmm_jax.errors import UserError
from lmm_jax.evaluation.judge import Judge

Row = dict[str, Any]  # a line of an answers file, in the published form of the benchmark (evaluation spec section 1.6)


@dataclasses.dataclass(frozen=True)
class Record:
    """One question.

    Attributes:
      key: its place in the benchmark, from 0; published ids are not unique (evaluation spec section 7, T6).
      text: what the user says, without placeholders; pictures come before it.
      images: paths of pictures, or the bytes of an encoded picture.
      video: path of a video file without or with suffix, or of a folder of frames; "" for none.
      most_frames: of a video that are looked at, one a second otherwise; None: any number.
      row: what its line of the answers file holds beside the reply.
    """

    key: int
    text: str
    images: tuple[str | bytes, ...] = ()
    video: str = ""
    most_frames: int | None = None
    row: Row = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answered:
    """A record and what became of it.

    Attributes:
      record: the question.
      reply: what the model said, stripped; "" where there is none.
      fault: why there is no reply, or none that counts: "" (there is one), "missing" (never answered), or what went wrong
        with its media. An answer with a fault is always wrong (evaluation spec section 7, T9 and T10).
    """

    record: Record
    reply: str
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """All records of a benchmark, in their order, with what was answered.

    Attributes:
      folder: the benchmark's data.
      answers: one for each record.
      judge: asks an LLM; None where none was named.
    """

    folder: Path
    answers: Sequence[Answered]
    judge: Judge | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """What a run is worth.

    Attributes:
      headline: the figure that is published, in the published unit (percent, points, or a judge's scale).
      figures: all figures by name; names with " / " are parts of a table, as "type / colour".
      right: for each record how right it is, 0 to 1; None where it does not count (text-only records of ScienceQA-IMG).
      notes: sentences about what readers must know: unparsable replies, denominators of zero, judges that failed.
      expected: for each record the answer that counts as right, as one line of text; None where there is none. Empty where
        the benchmark has none.
    """

    headline: float
    figures: Mapping[str, float]
    right: Sequence[float | None]
    notes: Sequence[str] = ()
    expected: Sequence[str | None] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      name: on the command line, as "textvqa".
      title: in tables, as "TextVQA".
      folder: below the data root, as eval.zip lays it out (evaluation spec section 4).
      records: reads them from that folder.
      answer_row: a record and a reply -> its line of the answers file, in the published form.
      rows_of: a line of an answers file of others -> the lines that ours would hold in its place.
      reply_of: such a line -> the reply.
      identity: a line of an answers file, ours or of others -> what tells its record from all others, as far as ids can.
      answers: where answers are kept in a run folder; "" is under the benchmark's own name. Benchmarks with the same records
        share them by the same name here.
      max_new_tokens: limit of a reply.
      headline: what the figure is, as "accuracy, %".
      score: None where only a server knows the answers.
      export: writes what is handed in, below a folder that is there; returns the files. None where nothing is handed in.
      judged: whether `score` needs a judge.
      published: model -> figure (evaluation spec section 6).
      published_figures: model -> further figures that are published, by the names that `Score.figures` has for them.
      size: records of the published data; None where that is not known.
    """

    name: str
    title: str
    folder: str
    records: Callable[[Path], list[Record]]
    max_new_tokens: int
    headline: str
    answer_row: Callable[[Record, str], Row]
    rows_of: Callable[[Row], list[Row]] = lambda row: [row]
    reply_of: Callable[[Row], str] = lambda row: row["text"]
    identity: Callable[[Row], Hashable] = lambda row: row.get("question_id")
    score: Callable[[Run], Score] | None = None
    export: Callable[[Run, Path], list[Path]] | None = None
    judged: bool = False
    answers: str = ""
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    published_figures: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    size: int | None = None

    def identity_of(self, record: Record) -> Hashable:
        """What `identity` says of a record's line."""
        return self.identity(self.answer_row(record, ""))


def one_line(text: Any) -> str:
    """A text, or what else a file has for an answer, without line ends."""
    return " ".join(str(text).split())


def read_lines(file: Path, broken: list[int] | None = None) -> list[Row]:
    """A file of JSON lines.

    Args:
      file: in UTF-8.
      broken: takes the numbers, from 1, of lines that are no JSON objects; None refuses them.

    Raises:
      UserError: it is missing, or a line is not a JSON object; names the line.
    """
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):  # not where other characters end lines of prose
        if line.strip():
            try:
                rows.append(_object(line))
            except (ValueError, RecursionError) as error:
                if broken is None:
                    raise UserError(f"line {number} of {file} is not a JSON object: {error}") from error
                broken.append(number)
    return rows


def read_json(file: Path) -> Any:
    """A JSON file.

    Raises:
      UserError: it is missing or not JSON.
    """
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def read_text(file: Path) -> str:
    """A text file in UTF-8.

    Raises:
      UserError: it is missing or no text.
    """
    try:
        return file.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {file}: the benchmark's files are laid out as in eval.zip, see docs/evaluation.md"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _object(line: str) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"it holds {line[:40]!r}")
    return row

"""Results of one or several runs beside published ones: one table, here as Markdown; `report_html` makes a page of it.

    run folders ─► read_runs ─► RunResults ─► table ─┬─► markdown
                                                     └─► report_html.html, with figures, settings and examples

Whatever keeps two figures of a row from being compared (other judges, wordings, settings, records) is said in a footnote.
Replies, questions and judges' words are untrusted: they reach no page but through `legible` and an escape.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmm_jax.errors import UserError
from lmm_jax.evaluation import registry
from lmm_jax.evaluation.benchmark import read_json, read_text

NOTHING = "–"  # in place of a figure that is not there

_OF_MODEL = ("model", "folder", "digest", "versions")  # settings that may differ between the columns of a row without a word
_OTHER_JUDGES = "Published figures are by their authors' judges, which are not those of the runs."
_AGAIN = "score the run again with `lmm eval score`"
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
# controls that are no line break or tab; embeddings and overrides of the writing direction; halves of surrogate pairs
_ILLEGIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~#]|(?<!\w)_|_(?!\w)")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Scored:
    """A record, its answer, and how right that is: 0 to 1, or None where it does not count.

    Attributes:
      fault: as of `benchmark.Answered`.
      expected: the answer that counts as right; None where none is known.
    """

    key: int
    question: str
    reply: str
    fault: str
    right: float | None
    expected: str | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run scored in one benchmark; figures that are not there (NaN in the file) are None.

    Attributes:
      figures: names with " / " are parts of a table, as "type / colour".
      counts: records, and how many of them are missing or have faults.
      judge: who judged by which wording, as the end of a sentence; "" where nobody did.
      settings: what it was answered with.
      records: by key.
    """

    benchmark: str
    title: str
    headline_name: str
    headline: float | None
    figures: Mapping[str, float | None]
    notes: Sequence[str]
    counts: Mapping[str, int]
    published: Mapping[str, float | None]
    judge: str
    settings: Mapping[str, Any]
    records: Mapping[int, Scored]


@dataclasses.dataclass(frozen=True)
class RunResults:
    """A run.

    Attributes:
      name: of its model, with the folder where two runs have the same.
      results: by benchmark.
      unscored: benchmarks that were answered, but not scored.
    """

    name: str
    settings: Mapping[str, Any]
    results: Mapping[str, Result]
    unscored: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure as text, and the numbers of its footnotes, from 1."""

    text: str
    marks: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: a benchmark, and a cell for each run and for each published model."""

    benchmark: str
    title: Cell
    headline_name: str
    runs: Sequence[Cell]
    published: Sequence[Cell]


@dataclasses.dataclass(frozen=True)
class Table:
    """All lines; names of the runs and of the published models over their columns; footnotes, and notes on the whole."""

    runs: Sequence[str]
    published: Sequence[str]
    lines: Sequence[Line]
    footnotes: Sequence[str]
    notes: Sequence[str]


def read_runs(folders: Sequence[Path]) -> list[RunResults]:
    """Reads what runs have scored.

    Raises:
      UserError: no folder, the same twice, one that is no run or was not scored, or a damaged file.
    """
    if not folders:
        raise UserError("no run was given: give the folders that `lmm eval answer` and `lmm eval score` wrote to")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run was given twice: give each folder once")
    runs = [_read_run(folder) for folder in folders]
    often = collections.Counter(run.name for run in runs)
    return [
        dataclasses.replace(run, name=f"{run.name} ({folder})") if often[run.name] > 1 else run
        for run, folder in zip(runs, folders)
    ]


def table(runs: Sequence[RunResults], order: Sequence[str]) -> Table:
    """The figures of runs, and of published models.

    Args:
      runs: become the first columns.
      order: names of benchmarks; those that are not among them come last, by name.
    """
    scored = {name for run in runs for name in run.results}
    names = [name for name in order if name in scored] + sorted(scored.difference(order))
    published = [model for name in names for run in runs if name in run.results for model in run.results[name].published]
    models = list(dict.fromkeys(published))
    footnotes = _Footnotes()
    lines = [_line(name, runs, models, footnotes) for name in names]
    notes = [f"{run.name} has answers but no scores for {', '.join(run.unscored)}." for run in runs if run.unscored]
    return Table([run.name for run in runs], models, lines, footnotes.texts, notes)


def markdown(runs: Sequence[RunResults], order: Sequence[str]) -> str:
    """The table as Markdown, with footnotes and scorers' notes below; arguments as of `table`."""
    made = table(runs, order)
    rows = [["Benchmark", "Figure", *map(_escaped, made.runs), *(_escaped(f"{name} (published)") for name in made.published)]]
    for line in made.lines:
        cells = [line.title, Cell(line.headline_name), *line.runs, *line.published]
        rows.append([_escaped(c.text) + "".join(" " + _superscript(mark) for mark in c.marks) for c in cells])
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rows = [[_padded(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths))] for row in rows]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    below = [f"{_superscript(number)} {_escaped(text)}" for number, text in enumerate(made.footnotes, 1)]
    below += [_escaped(note) for note in made.notes]
    for line in made.lines:
        for run in runs:
            notes = run.results[line.benchmark].notes if line.benchmark in run.results else ()
            below += [f"{_escaped(f'{line.title.text}, {run.name}: {note}')}" for note in notes]
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    return "\n".join(lines + [""] * bool(below) + [f"- {text}" for text in below]) + "\n"


def legible(text: str) -> str:
    """Text whose characters may stand in any page; a replacement character stands for each that may not."""
    return _ILLEGIBLE.sub("\ufffd", text.replace("\r\n", "\n"))


def number(value: float | None, decimals: int) -> str:
    """A figure as text."""
    return NOTHING if value is None else f"{value:.{decimals}f}"


def setting(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of settings that are not the same in all runs, by name; not those by which models differ anyway."""
    names = sorted({name for s in settings for name in s if name not in _OF_MODEL})
    return [name for name in names if any(s.get(name) != settings[0].get(name) for s in settings)]


class _Footnotes:
    """Texts, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, *texts: str) -> list[int]:
        """Numbers of the texts that are not empty."""
        self.texts += [text for text in dict.fromkeys(texts) if text and text not in self.texts]
        return [self.texts.index(text) + 1 for text in dict.fromkeys(texts) if text]


def _line(name: str, runs: Sequence[RunResults], models: Sequence[str], footnotes: _Footnotes) -> Line:
    found = [(run.name, run.results[name]) for run in runs if name in run.results]
    first = found[0][1]
    published = collections.ChainMap(*(dict(result.published) for _, result in found))
    values = [result.headline for _, result in found] + list(published.values())
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    decimals = 2 if largest < 10 and "%" not in first.headline_name else 1
    title = Cell(first.title, footnotes.mark(*_differences(found)))
    cells = []
    for run in runs:
        result = run.results.get(name)
        marks = footnotes.mark(_incomplete(result), result.judge and f"Judged by {result.judge}.") if result else []
        cells.append(Cell(number(result.headline, decimals) if result else NOTHING, marks))
    judged = any(result.judge for _, result in found)
    marks = footnotes.mark(_OTHER_JUDGES) if judged and published else []
    beside = [Cell(number(published[m], decimals), marks) if m in published else Cell(NOTHING) for m in models]
    return Line(name, title, first.headline_name, cells, beside)


def _incomplete(result: Result) -> str:
    """What is said of records that have no answer that counts."""
    records, missing, faults = (result.counts[name] for name in ("records", "missing", "faults"))
    parts = [f"{missing} never answered"] * bool(missing) + [f"{faults} with a fault"] * bool(faults)
    return f"Of {records} records: {' and '.join(parts)}; these count as wrong." if parts else ""


def _differences(found: Sequence[tuple[str, Result]]) -> list[str]:
    """Why the figures of some runs cannot be compared just so."""
    results = [result for _, result in found]
    told = []
    if len({result.judge for result in results}) > 1:
        told.append("The runs were judged differently; figures by different judges or wordings cannot be compared.")
    for what, values in (
        ("The figures are not the same thing", [result.headline_name for result in results]),
        ("The runs have different numbers of records", [str(result.counts["records"]) for result in results]),
    ):
        if len(set(values)) > 1:
            told.append(f"{what}: {_each(found, values)}.")
    asked = collections.defaultdict(set)
    for result in results:
        for key, record in result.records.items():
            asked[key].add(record.question)
    if any(len(questions) > 1 for questions in asked.values()):
        told.append("The runs were asked different questions: their data are not the same.")
    settings = [result.settings for result in results]
    for name in differing(settings):
        told.append(f"Answered with different settings; {name}: {_each(found, [setting(s.get(name)) for s in settings])}.")
    return told


def _each(found: Sequence[tuple[str, Result]], values: Sequence[str]) -> str:
    return ", ".join(f"{value} ({name})" for (name, _), value in zip(found, values))


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(legible(text).split()))


def _superscript(mark: int) -> str:
    return str(mark).translate(_SUPERSCRIPTS)


def _padded(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _read_run(folder: Path) -> RunResults:
    if not (folder / "settings.json").is_file():
        raise UserError(f"{folder} is no run, it has no settings.json: give a folder that `lmm eval answer` wrote to")
    settings = read_json(folder / "settings.json")
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), str):
        raise UserError(f"{folder / 'settings.json'} does not name a model: the file is damaged, answer in a new folder")
    places = sorted(place for place in folder.iterdir() if place.is_dir())
    results = {place.name: _read_result(place) for place in places if (place / "scores.json").exists()}
    if not results:
        raise UserError(f"nothing in {folder} has been scored: run `lmm eval score` first")
    answered = {p.name for p in places if any(p.glob("part.*.jsonl"))}
    table = registry.benchmarks().values()
    unscored = [b.name for b in table if b.score and (b.answers or b.name) in answered and b.name not in results]
    return RunResults(settings["model"], settings, results, unscored)


def _read_result(place: Path) -> Result:
    file = place / "scores.json"
    scores, records = read_json(file), _read_records(place / "scored.jsonl")
    try:
        if _take(scores, "benchmark", str) != place.name:
            raise ValueError(f"it is of {scores['benchmark']}")
        result = Result(
            benchmark=place.name,
            title=_take(scores, "title", str),
            headline_name=_take(scores, "headline_name", str),
            headline=_figure(scores.get("headline")),
            figures={name: _figure(value) for name, value in _take(scores, "figures", dict).items()},
            notes=[str(note) for note in _take(scores, "notes", list)],
            counts={name: _take(_take(scores, "counts", dict), name, int) for name in ("records", "missing", "faults")},
            published={name: _figure(value) for name, value in _take(scores, "published", dict).items()},
            judge=_judge(scores.get("judge")),
            settings=_take(scores, "settings", dict),
            records=records,
        )
        if result.counts["records"] != len(records):
            raise ValueError(f"it is of {result.counts['records']} records, scored.jsonl of {len(records)}")
    except (ValueError, OverflowError) as error:
        raise UserError(f"{file} is damaged ({error}): {_AGAIN}") from error
    return result


def _read_records(file: Path) -> dict[int, Scored]:
    if not file.exists():
        raise UserError(f"there is no {file}: {_AGAIN}")
    records: dict[int, Scored] = {}
    for place, line in enumerate(read_text(file).split("\n"), 1):  # replies may hold what `splitlines` takes for an end
        if not line:
            continue
        try:
            row = json.loads(line)
            key, right = _take(row, "key", int), _figure(row.get("right"))
            if key in records or not 0 <= (right or 0) <= 1:
                raise ValueError("a key comes twice" if key in records else f"right is {right}")
            expected = None if row.get("expected") is None else _take(row, "expected", str)  # older files do not have it
            texts = (_take(row, name, str) for name in ("question", "reply", "fault"))
            records[key] = Scored(key, *texts, right, expected)
        except (ValueError, OverflowError) as error:
            raise UserError(f"line {place} of {file} is damaged ({error}): {_AGAIN}") from error
    return records


def _take(row: Any, name: str, kind: type[T]) -> T:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {json.dumps(value):.40}")
    return value


def _figure(value: Any) -> float | None:
    if not isinstance(value, int | float | None):
        raise ValueError(f"{json.dumps(value):.40} is no figure")
    return value if value is not None and math.isfinite(value) else None


def _judge(judge: Any) -> str:
    """As "gpt-x (served as gpt-x-0613), wording shipped, digest 0123456789abcdef"."""
    if judge is None:
        return ""
    model = _take(judge, "model", str)
    served = sorted(str(name) for name in _take(judge, "served", list))
    text = model if served in ([], [model]) else f"{model} (served as {', '.join(served)})"
    if judge.get("wording") is not None:
        text += f", wording {_take(judge['wording'], 'name', str)}, digest {_take(judge['wording'], 'digest', str)}"
    return text

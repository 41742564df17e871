"""Results of one or several runs beside published ones: one table, here as Markdown; `report_html` makes a page of it.

    RunResults, as `results` reads them ─► table ─┬─► markdown
                                                  └─► report_html.html, with figures, settings and examples

Whatever keeps two figures of a row from being compared (other judges, wordings, settings, records) is said in a footnote.
Replies, questions and judges' words are untrusted: they reach no page but through `legible` and an escape.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmm_jax.evaluation.results import Result, RunResults
from lmm_jax.evaluation.runs import off_size

NOTHING = "–"  # in place of a figure that is not there

_OF_MODEL = ("model", "folder", "digest", "versions")  # settings that may differ between the columns of a row without a word
_OTHER_JUDGES = "Published figures are by their authors' judges, which are not those of the runs."
_ASPECTS = tuple(f"videochatgpt_{name}" for name in ("correctness", "detail", "context", "temporal", "consistency"))
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
# controls that are no line break or tab; embeddings and overrides of the writing direction; halves of surrogate pairs
_ILLEGIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~#]|(?<!\w)_|_(?!\w)")


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
    notes += _mean_of_aspects(runs)
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


def _mean_of_aspects(runs: Sequence[RunResults]) -> Iterator[str]:
    """The one figure that papers give of Video-ChatGPT, for runs that have all aspects, and of the models beside them."""
    whole = [run for run in runs if all(name in run.results for name in _ASPECTS)]
    found = {run.name: [run.results[name].headline for name in _ASPECTS] for run in whole}
    for run in whole:
        of_models = [run.results[name].published for name in _ASPECTS]
        for model in of_models[0]:
            found[f"{model} (published)"] = [published.get(model) for published in of_models]
    if whole:
        means = (f"{name} {number(None if None in of else sum(of) / len(of), 2)}" for name, of in found.items())
        yield f"Video-ChatGPT, mean of the five aspects: {', '.join(means)}."


class _Footnotes:
    """Texts, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, *texts: str) -> list[int]:
        """Numbers of the texts."""
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
        return [self.texts.index(text) + 1 for text in dict.fromkeys(texts)]


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
        cells.append(Cell(number(result.headline, decimals), footnotes.mark(*_marked(result))) if result else Cell(NOTHING))
    judged = any(result.judge for _, result in found)
    marks = footnotes.mark(_OTHER_JUDGES) if judged and published else []
    beside = [Cell(number(published[m], decimals), marks) if m in published else Cell(NOTHING) for m in models]
    return Line(name, title, first.headline_name, cells, beside)


def _marked(result: Result) -> Iterator[str]:
    """What is said of a figure: who gave it, which records it is of, and which of these have no answer that counts."""
    if result.by_server:
        yield f"Its server scores it: hand in what lmm eval export {result.benchmark} writes."
    records, missing, faults = (result.counts[name] for name in ("records", "missing", "faults"))
    if unlike := off_size(records, result.size):
        yield f"{unlike}."
    parts = [f"{missing} never answered"] * bool(missing) + [f"{faults} with a fault"] * bool(faults)
    if parts:
        yield f"Of {records} records: {' and '.join(parts)}; these count as wrong."
    if result.judge:
        yield f"Judged by {result.judge}."


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

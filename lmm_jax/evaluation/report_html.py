"""Results of runs as one page of HTML that needs nothing else: the table of `report`, all figures, settings, and examples.

No script and no address of another page stands in it. Texts of models, questions and judges come in through `_text` alone.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from PIL import Image

from lmm_jax.data.image import load_image
from lmm_jax.errors import UserError
from lmm_jax.evaluation.report import (
    NOTHING,
    Cell,
    Table,
    differing,
    legible,
    markdown,
    number,
    setting,
    table,
)
from lmm_jax.evaluation.results import Result, RunResults, Scored
from lmm_jax.evaluation.runs import write_whole

Picture = bytes | str | os.PathLike | Image.Image
Pictures = Callable[[str, int], Sequence[Picture]]  # (benchmark, key of a record) -> its pictures, or frames of its video

THUMBNAIL = 240  # pixels of the longer edge
MOST_PICTURES = 4  # of one record
LONGEST_TEXT = 3000  # characters of a reply or question
MOST_FAULTS = 20  # that are listed

_RIGHT = 0.5  # from here on an answer is an example of right ones


def write(
    folder: Path, runs: Sequence[RunResults], order: Sequence[str], pictures: Pictures | None = None, examples: int = 6
) -> list[Path]:
    """Writes `results.md` and `results.html`, each whole or not at all, and returns them; arguments as of `html`.

    Raises:
      UserError: the folder cannot be written to.
    """
    texts = {"results.md": markdown(runs, order), "results.html": html(runs, order, pictures, examples)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [write_whole(folder / name, text) for name, text in texts.items()]
    except OSError as error:
        raise UserError(f"the results cannot be written to {folder}: {error}") from error


def html(runs: Sequence[RunResults], order: Sequence[str], pictures: Pictures | None = None, examples: int = 6) -> str:
    """The page.

    Args:
      runs: side by side.
      order: of the benchmarks, as for `report.table`.
      pictures: gives the pictures of a record; those that cannot be had or read become a note. None shows none.
      examples: of wrong answers, and as many of right ones, for each benchmark; see `choose`.
    """
    made = table(runs, order)
    sections = []
    for place, line in enumerate(made.lines, 1):
        found = [(run.name, run.results[line.benchmark]) for run in runs if line.benchmark in run.results]
        sections.append(_section(place, found, line.headline_name, pictures, examples))
    style = resources.files("lmm_jax.evaluation").joinpath("report.css").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>Evaluation results: {_text(", ".join(made.runs))}</title>
<style>
{style}</style>
</head>
<body>
<h1>Evaluation results</h1>
{_overview(made)}
{"".join(sections)}</body>
</html>
"""


def choose(results: Sequence[Result], most: int) -> tuple[list[int], list[int]]:
    """Keys of wrong and of right answers to show: at most so many of each, and always the same.

    Wrong are those that some run has wrong: first those that another has right, then the others, each by key. Right are those
    that every run has right. Records that do not count, and answers with a fault, are neither; faults are listed apart.
    """
    verdicts: dict[int, list[bool]] = {}
    for result in results:
        for key, record in result.records.items():
            if record.right is not None and not record.fault:
                verdicts.setdefault(key, []).append(record.right >= _RIGHT)
    wrong = sorted((key for key, said in verdicts.items() if not all(said)), key=lambda key: (not any(verdicts[key]), key))
    right = sorted(key for key, said in verdicts.items() if all(said))
    return wrong[:most], right[:most]


def _overview(made: Table) -> str:
    heads = [f'<th scope="col">{_text(name)}</th>' for name in (*made.runs, *made.published)]
    groups = [(title, len(names)) for title, names in (("runs", made.runs), ("published", made.published)) if names]
    rows = []
    for place, line in enumerate(made.lines, 1):
        title = f'<a href="#benchmark-{place}">{_text(line.title.text)}</a>{_marks(line.title)}'
        cells = [f"<td>{_text(cell.text)}{_marks(cell)}</td>" for cell in line.runs]
        cells += [f'<td class="published">{_text(cell.text)}{_marks(cell)}</td>' for cell in line.published]
        name = f"<small>{_text(line.headline_name)}</small>"
        rows.append(f'<tr><th scope="row">{title}{name}</th>{"".join(cells)}</tr>\n')
    over = "".join(f'<th scope="colgroup" colspan="{width}">{title}</th>' for title, width in groups)
    notes = [f'<li id="note-{place}" value="{place}">{_text(text)}</li>\n' for place, text in enumerate(made.footnotes, 1)]
    return f"""<div class="scroll"><table class="overview">
<thead><tr><td></td>{over}</tr>
<tr><th scope="col">benchmark</th>{"".join(heads)}</tr></thead>
<tbody>
{"".join(rows)}</tbody></table></div>
{_around("ol", "notes", notes)}{_around("ul", "notes", [f"<li>{_text(note)}</li>" for note in made.notes])}"""


def _section(
    place: int, found: Sequence[tuple[str, Result]], headline_name: str, pictures: Pictures | None, examples: int
) -> str:
    results = [result for _, result in found]
    benchmark, title = results[0].benchmark, results[0].title
    said = [(f"{name}: " if len(found) > 1 else "", result) for name, result in found]
    notes = [f"<li>{_text(f'{name}judged by {result.judge}.')}</li>\n" for name, result in said if result.judge]
    notes += [f"<li>{_text(name + note)}</li>\n" for name, result in said for note in result.notes]
    shown = []
    for which, keys in zip(("wrong", "right"), choose(results, examples)):
        cards = [_example(benchmark, key, found, pictures) for key in keys]
        opened = which == "wrong"
        summary = f"Examples of {which} answers" + (" (by at least one run)" if opened and len(found) > 1 else "")
        shown.append(_details(summary, "".join(cards), opened) if cards else "")
    return f"""<section id="benchmark-{place}">
<h2>{_text(title)}</h2>
{_figures(found, headline_name)}{_around("ul", "notes", notes)}{_details("Settings", _settings(found))}{_faults(found)}
{"".join(shown)}</section>
"""


def _figures(found: Sequence[tuple[str, Result]], headline_name: str) -> str:
    """Headline, other figures and counts; then a table for each group of figures, as "type / colour" is of "type"."""
    names, results = [name for name, _ in found], [result for _, result in found]
    published: dict[str, dict[str, float | None]] = {}
    for result in results:
        for model, figures in result.published_figures.items():
            published.setdefault(model, {}).update({headline_name: result.published.get(model), **figures})
    headlines = [result.headline for result in results]
    groups: dict[str, dict[str, list[float | None]]] = {"": {headline_name: headlines}}
    for figure in dict.fromkeys(figure for result in results for figure in result.figures):
        group, parted, part = figure.partition(" / ")
        values = [result.figures.get(figure) for result in results]
        if parted:
            groups.setdefault(group, {})[part] = values
        elif values != headlines:
            groups[""][figure] = values
    plain = groups.pop("") | {name: [result.counts[name] for result in results] for name in ("records", "missing", "faults")}
    tables = [_group(names, group, rows, published) for group, rows in groups.items()]
    parts = f'<div class="groups">{"".join(tables)}</div>' if tables else ""
    return _group(names, "", plain, published) + (_details(f"Figures of parts ({', '.join(groups)})", parts) if parts else "")


def _group(
    runs: Sequence[str],
    title: str,
    rows: Mapping[str, Sequence[float | None]],
    published: Mapping[str, Mapping[str, float | None]],
) -> str:
    """A table of figures of the runs, with a column for each model of which one of them is published."""
    figures = {part: f"{title} / {part}" if title else part for part in rows}
    models = [model for model, known in published.items() if not known.keys().isdisjoint(figures.values())]
    lines = []
    for part, values in rows.items():
        beside = [published[model].get(figures[part]) for model in models]
        lines.append(_row(part, values, beside, group_of=list(rows.values()) if title else ()))
    return _table([*runs, *(f"{model} (published)" for model in models)], title, lines)


def _row(
    name: str,
    values: Sequence[float | None],
    published: Sequence[float | None],
    group_of: Sequence[Sequence[float | None]],
) -> str:
    """A row of figures, all of a group with the same number of decimals; published ones have those that they came with."""
    known = [value for row in group_of or [values] for value in row if value is not None]
    largest = max(map(abs, known), default=0)
    decimals = 0 if all(isinstance(value, int) for value in known) else 1 if largest >= 10 else 2 if largest >= 1 else 3
    cells = [f"<td>{number(value, decimals)}</td>" for value in values]
    cells += [f'<td class="published">{NOTHING if value is None else value}</td>' for value in published]
    return f'<tr><th scope="row">{_text(name)}</th>{"".join(cells)}</tr>\n'


def _settings(found: Sequence[tuple[str, Result]]) -> str:
    settings = [result.settings for _, result in found]
    unlike = differing(settings)
    rows = []
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [_text(setting(each[name])) if name in each else NOTHING for each in settings]
        sign = ' class="differs"' if name in unlike else ""
        rows.append(f'<tr{sign}><th scope="row">{_text(name)}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>\n')
    return _table([name for name, _ in found], "", rows, "texts")


def _table(columns: Sequence[str], title: str, rows: Sequence[str], kind: str = "") -> str:
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    body = f'<thead><tr><th scope="col">{_text(title)}</th>{heads}</tr></thead>\n<tbody>{"".join(rows)}</tbody>'
    return f'<div class="scroll"><table class="{kind}">\n{body}</table></div>\n'


def _faults(found: Sequence[tuple[str, Result]]) -> str:
    """Records without an answer that counts: the first of each run, and how many more there are."""
    lines, total = [], 0
    for name, result in found:
        faulty = [record for _, record in sorted(result.records.items()) if record.fault]
        total += len(faulty)
        lines += [f"<li>{_text(f'{name}, record {r.key}: {_cut(r.fault)}')}</li>\n" for r in faulty[:MOST_FAULTS]]
        if len(faulty) > MOST_FAULTS:
            lines.append(f"<li>{_text(name)}: {len(faulty) - MOST_FAULTS} more</li>\n")
    return _details(f"Records without an answer that counts ({total})", _around("ul", "notes", lines)) if lines else ""


def _example(benchmark: str, key: int, found: Sequence[tuple[str, Result]], pictures: Pictures | None) -> str:
    records = [(name, result.records.get(key)) for name, result in found]
    question = next(record.question for _, record in records if record)
    shown = _strip(pictures, benchmark, key) if pictures else ""
    replies = "".join(_reply(name, record) for name, record in records)
    head = f'<div class="key">record {key}</div><div class="text question" dir="auto">{_text(_cut(question))}</div>'
    if expected := next((record.expected for _, record in records if record and record.expected), None):
        head += f'<div class="expected">expected: <bdi>{_text(_cut(expected))}</bdi></div>'
    return f'<article>\n{shown}<div class="said">{head}\n<div class="replies">{replies}</div></div>\n</article>\n'


def _reply(run: str, record: Scored | None) -> str:
    sign, kind = _verdict(record)
    if record is None or record.fault:
        said = f'<div class="text fault">{_text(_cut(record.fault) if record else "no such record")}</div>'
    else:
        said = f'<div class="text" dir="auto">{_text(_cut(record.reply)) or "<em>nothing</em>"}</div>'
    return f'<div class="reply {kind}"><div class="head"><bdi>{_text(run)}</bdi> <span>{sign}</span></div>\n{said}</div>\n'


def _verdict(record: Scored | None) -> tuple[str, str]:
    """What is said of an answer, and its class."""
    if record is None or record.right is None:
        return "does not count", "uncounted"
    if record.right in (0, 1):
        return ("✓ right", "right") if record.right else ("✗ wrong", "wrong")
    return f"{100 * record.right:.0f} % right", "right" if record.right >= _RIGHT else "wrong"


def _strip(pictures: Pictures, benchmark: str, key: int) -> str:
    """Small pictures of a record, evenly chosen among many; a note where they cannot be had."""
    try:
        found = list(pictures(benchmark, key))
    except Exception as error:  # it reads whatever media there are; a page is not lost over one example
        return f'<div class="pictures">{_no_picture(error)}</div>\n'
    count = min(len(found), MOST_PICTURES)
    places = [i * len(found) // count for i in range(count)]
    shown = "".join(_picture(found[i], f"picture {i + 1} of {len(found)} of record {key}") for i in places)
    more = f'<p class="note">{count} of {len(found)} pictures</p>' if len(found) > count else ""
    return f'<div class="pictures">{shown}{more}</div>\n' if shown else ""


def _picture(source: Picture, name: str) -> str:
    try:
        image = load_image(source, upright=True)
    except UserError as error:
        return _no_picture(error)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" alt="{name}">'


def _no_picture(error: Exception) -> str:
    return f'<p class="note">No picture: {_text(_cut(str(error) or type(error).__name__))}</p>'


def _marks(cell: Cell) -> str:
    links = ", ".join(f'<a href="#note-{mark}">{mark}</a>' for mark in cell.marks)
    return f"<sup>{links}</sup>" if links else ""


def _details(summary: str, inside: str, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{_text(summary)}</summary>\n{inside}</details>\n"


def _around(tag: str, kind: str, inside: Sequence[str]) -> str:
    return f'<{tag} class="{kind}">\n{"".join(inside)}</{tag}>\n' if inside else ""


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters)"


def _text(text: str) -> str:
    """Any text, as content of an element or of an attribute."""
    return escape(legible(text))

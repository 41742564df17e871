"""What runs have scored, read from their folders and checked, for `report` and `report_html`."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmm_jax.errors import UserError
from lmm_jax.evaluation import registry
from lmm_jax.evaluation.benchmark import Benchmark, read_json, read_text
from lmm_jax.evaluation.runs import Answers, settings_of

_AGAIN = "score the run again with `lmm eval score`"

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
      published_figures: model -> figures of the same names.
      judge: who judged by which wording, as the end of a sentence; "" where nobody did.
      settings: what it was answered with.
      records: by key.
      size: records of the published data; None where that is not known.
      by_server: whether only the benchmark's server scores it, so that there are no figures and no records here.
    """

    benchmark: str
    title: str
    headline_name: str
    headline: float | None
    figures: Mapping[str, float | None]
    notes: Sequence[str]
    counts: Mapping[str, int]
    published: Mapping[str, float | None]
    published_figures: Mapping[str, Mapping[str, float | None]]
    judge: str
    settings: Mapping[str, Any]
    records: Mapping[int, Scored]
    size: int | None = None
    by_server: bool = False


@dataclasses.dataclass(frozen=True)
class RunResults:
    """A run.

    Attributes:
      name: of its model, with the folder where two runs have the same.
      results: by benchmark.
      unscored: benchmarks that were answered and can be scored here, but were not.
    """

    name: str
    settings: Mapping[str, Any]
    results: Mapping[str, Result]
    unscored: Sequence[str]


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


def _read_run(folder: Path) -> RunResults:
    if not (folder / "settings.json").is_file():
        raise UserError(f"{folder} is no run, it has no settings.json: give a folder that `lmm eval answer` wrote to")
    settings = read_json(folder / "settings.json")
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), str):
        raise UserError(f"{folder / 'settings.json'} does not name a model: the file is damaged, answer in a new folder")
    places = sorted(place for place in folder.iterdir() if place.is_dir())
    results = {place.name: _read_result(place) for place in places if (place / "scores.json").exists()}
    answered = {p.name for p in places if any(p.glob("part.*.jsonl"))}
    left = [b for b in registry.benchmarks().values() if (b.answers or b.name) in answered and b.name not in results]
    results |= {b.name: _by_server(folder, b) for b in left if not b.score}
    if not results:
        raise UserError(f"nothing in {folder} has been scored: run `lmm eval score` first")
    return RunResults(settings["model"], settings, results, [b.name for b in left if b.score])


def _by_server(folder: Path, b: Benchmark) -> Result:
    """A benchmark that was answered, as far as one knows who does not have its server's figures."""
    answers = Answers(folder, b)
    found = answers.read()
    faults = sum(bool(fault) for _, fault in found.values())
    return Result(
        benchmark=b.name,
        title=b.title,
        headline_name=b.headline,
        headline=None,
        figures={},
        notes=[],
        counts={"records": len(found), "missing": 0, "faults": faults},
        published=b.published,
        published_figures=b.published_figures,
        judge="",
        settings=settings_of(folder) | settings_of(answers.folder),
        records={},
        size=b.size,
        by_server=True,
    )


def _read_result(place: Path) -> Result:
    file = place / "scores.json"
    scores, records = read_json(file), _read_records(place / "scored.jsonl")
    try:
        if _take(scores, "benchmark", str) != place.name:
            raise ValueError(f"it is of {scores['benchmark']}")
        beside = _take(scores, "published_figures", dict) if "published_figures" in scores else {}  # as in older files
        result = Result(
            benchmark=place.name,
            title=_take(scores, "title", str),
            headline_name=_take(scores, "headline_name", str),
            headline=_figure(scores.get("headline")),
            figures=_figures(_take(scores, "figures", dict)),
            notes=[str(note) for note in _take(scores, "notes", list)],
            counts={name: _take(_take(scores, "counts", dict), name, int) for name in ("records", "missing", "faults")},
            published=_figures(_take(scores, "published", dict)),
            published_figures={model: _figures(_take(beside, model, dict)) for model in beside},
            judge=_judge(scores.get("judge")),
            settings=_take(scores, "settings", dict),
            records=records,
            size=None if scores.get("size") is None else _take(scores, "size", int),
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


def _figures(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: _figure(value) for name, value in values.items()}


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

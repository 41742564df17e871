"""``lmm eval answer | score | export | table | list``."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmm_jax.config import KV_CACHES, QUANTIZATIONS, TEMPLATES
from lmm_jax.demo import MODEL
from lmm_jax.errors import UserError
from lmm_jax.evaluation import registry, report, report_html, results, runs, wording
from lmm_jax.evaluation.benchmark import Answered, Benchmark, Record, Run, Score
from lmm_jax.evaluation.judge import OPENAI, Endpoint, Judge, Usage
from lmm_jax.evaluation.stills import Pictures

if TYPE_CHECKING:
    from lmm_jax.inference.assistant import Assistant

_LISTED = 10  # files or records that an error names
_BETWEEN = 30.0  # seconds between lines on a judge in a log


def answer(args: argparse.Namespace) -> None:
    """Asks a model; goes on where it was stopped."""
    words = _wording(args)
    chosen = registry.choose(args.benchmarks, words)
    shard, shards = _shard(args.shard)
    for name, number in (("--batch-size", args.batch_size), ("--max-new-tokens", args.max_new_tokens)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: expected at least 1")
    if not args.model:
        raise UserError(
            "no model was given: --model DIR, a folder made by `python -m conversion from-hf SRC DIR`; "
            f"the demo model's is {MODEL}"
        )
    from lmm_jax.cluster import join_processes
    from lmm_jax.evaluation.runner import Asking, missing_media
    from lmm_jax.evaluation.runner import answer as ask

    read = {b.name: _records(b, args) for b in chosen}
    for b in chosen:
        if unlike := runs.off_size(len(read[b.name]), b.size):
            print(f"note: {b.title}: {unlike}", file=sys.stderr)
    missing = [path for records in read.values() for path in missing_media(records)]
    if missing and not args.allow_missing:
        raise UserError(
            f"{len(missing)} pictures or videos are not there ({_some(missing)}): get them, or count their questions as wrong "
            "with --allow-missing"
        )
    join_processes(patience=30 * 24 * 3600)  # parts take unlike long
    import jax

    if jax.process_count() > 1:
        if shards > 1:
            raise UserError(
                f"--shard {args.shard}: the {jax.process_count()} processes of a cluster share the work by themselves"
            )
        shard, shards = jax.process_index(), jax.process_count()
    assistant = _load(args)
    limits = {b.name: args.max_new_tokens or b.max_new_tokens for b in chosen}
    settings = _settings(args, assistant)
    runs.settle(args.out, settings, fresh=True)
    runs.add_session(args.out, _session(args, assistant, f"{shard + 1}/{shards}", list(read)))
    for b in chosen:
        answers = runs.Answers(args.out, b)
        questions = runs.questions_digest(read[b.name])
        runs.settle(answers.folder, {"max_new_tokens": limits[b.name], "questions": questions})
        asking = Asking(args.batch_size, limits[b.name], args.template, shard, shards)
        ask(assistant, read[b.name], answers, asking, b.title)
        whole = answers.merge(read[b.name], settings["model"])
        counts = runs.counts(runs.gather(read[b.name], answers.read()))
        print(f"{b.title}: {whole or 'this shard is done, others are not'}, {runs.counted(counts)}")


def score(args: argparse.Namespace) -> None:
    """Figures, from a run folder or from an answers file; needs no accelerator."""
    words = _wording(args)
    chosen = registry.choose(args.benchmarks, words)
    shown, failed = _Shown(), []
    judge = _judge(args, shown)
    for b in chosen:
        if b.score is None:
            print(f"{b.title}: scored by its server only: lmm eval export {b.name}")
            continue
        try:
            run = _run(b, args, judge)
            found = b.score(run)
            shown.end()
            _keep(args, b, run, found, words)
        except UserError as error:
            shown.end()
            if len(chosen) == 1:
                raise
            failed.append(f"{b.title}: {error}")
    if failed:
        raise UserError("; ".join(failed))


def export(args: argparse.Namespace) -> None:
    """What is handed in to a benchmark's server, or to its own tools."""
    words = _wording(args)
    for b in registry.choose(args.benchmarks, words):
        if b.export is None:
            raise UserError(f"{b.title} has nothing to hand in: lmm eval score {b.name}")
        folder = args.out / b.name / "export"
        run = _run(b, args, None)
        counts = runs.counts(run.answers)
        if counts["missing"] or counts["faults"]:
            print(f"note: {b.title}: {runs.counted(counts)}: these are handed in as empty", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        for file in b.export(run, folder):
            print(file)


def table(args: argparse.Namespace) -> None:
    """Runs beside each other and beside published figures."""
    found = results.read_runs(args.runs)
    order = list(registry.benchmarks())
    text = report.markdown(found, order)
    print(text, end="")
    if args.markdown:
        runs.write_whole(args.markdown, text)
    if args.html:
        page = report_html.html(found, order, Pictures(_folders(args), args.data), examples=args.examples)
        runs.write_whole(args.html, page)


def listing(args: argparse.Namespace) -> None:
    """All benchmarks."""
    for b in registry.benchmarks().values():
        how = "judged by an LLM" if b.judged else "scored here" if b.score else "scored by a server"
        print(f"{b.name:26} {b.title:44} {b.folder:28} {how}")


def _records(b: Benchmark, args: argparse.Namespace) -> list[Record]:
    folder = _folders(args).get(b.name, args.data / b.folder)
    records = b.records(folder)
    if not records:
        raise UserError(f"{b.title} has no question below {folder}: get its files again")
    return records


def _folders(args: argparse.Namespace) -> dict[str, Path]:
    pairs = [text.partition("=") for text in args.folder]
    for name, sign, path in pairs:
        if not sign or not path or name not in registry.benchmarks():
            raise UserError(f"--folder {name}{sign}{path}: expected BENCHMARK=FOLDER")
    return {name: Path(path) for name, _, path in pairs}


def _run(b: Benchmark, args: argparse.Namespace, judge: Judge | None) -> Run:
    """The answers of a run folder or of a file; refuses when some are missing, unless they may be."""
    records = _records(b, args)
    if args.answers:
        broken: list[int] | None = [] if args.allow_missing else None
        answers = runs.from_file(b, records, args.answers, broken)
        if broken:
            print(f"note: lines {_some(broken)} of {args.answers} are not JSON objects and are left out", file=sys.stderr)
    elif not (args.out / runs.SETTINGS).exists():
        raise UserError(f"{args.out} is no run: ask a model with `lmm eval answer` first, or give --answers FILE")
    else:
        kept = runs.Answers(args.out, b)
        runs.check_questions(kept.folder, records)
        answers = runs.gather(records, kept.read())
    missing = [a.record.key for a in answers if a.fault == runs.MISSING]
    if missing and not args.allow_missing:
        raise UserError(
            f"{len(missing)} of {len(records)} records have no answer (number {_some(missing)}): answer them, or count them "
            "as wrong with --allow-missing"
        )
    if args.answers:  # only now: a slip in the command leaves no run behind
        name = args.name or runs.settings_of(args.out).get("model", args.answers.stem)
        runs.settle(args.out, {"model": name}, fresh=True)
    return Run(_folders(args).get(b.name, args.data / b.folder), answers, judge)


def _keep(args: argparse.Namespace, b: Benchmark, run: Run, found: Score, words: wording.Wording) -> None:
    """Prints a score and writes it down."""
    counts = runs.counts(run.answers)
    folder = args.out / b.name
    asked = {"answers": str(args.answers.resolve())} if args.answers else runs.settings_of(runs.Answers(args.out, b).folder)
    folder.mkdir(parents=True, exist_ok=True)
    judged = None
    if b.judged:
        j = run.judge
        judged = {"model": j.model, "url": j.url, "served": sorted(j.served), "wording": _label(words)}
    scores = {
        "benchmark": b.name,
        "title": b.title,
        "headline_name": b.headline,
        **runs.as_json(found),
        "counts": counts,
        "published": dict(b.published),
        "published_figures": {model: dict(figures) for model, figures in b.published_figures.items()},
        "size": b.size,
        "judge": judged,
        "settings": runs.settings_of(args.out) | asked,
    }
    runs.write_whole(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
    expected = found.expected or [None] * len(run.answers)
    lines = (_scored(*of) for of in zip(run.answers, found.right, expected, strict=True))
    runs.write_whole(folder / "scored.jsonl", "".join(lines))
    print(f"{b.title}: {found.headline:.2f} ({b.headline}), {counts['records']} records")
    for name in ("missing", "faults"):
        if counts[name]:
            print(f"  {counts[name]} {name}, counted as wrong")
    for note in filter(None, (runs.off_size(counts["records"], b.size), *found.notes)):
        print(f"  note: {note}")


def _scored(a: Answered, right: float | None, expected: str | None) -> str:
    row = {"key": a.record.key, "question": a.record.text, "reply": a.reply, "fault": a.fault, "right": right}
    return json.dumps(row | {"expected": expected}) + "\n"


def _load(args: argparse.Namespace) -> Assistant:
    import jax

    from lmm_jax.inference.loading import load

    mesh = args.mesh
    if jax.process_count() > 1:
        from lmm_jax.sharding import make_mesh

        mesh = make_mesh(args.mesh, jax.local_devices())
    return load(args.model, mesh=mesh, dtype=args.dtype, quantize=args.quantize, kv_cache=args.kv_cache)


def _settings(args: argparse.Namespace, assistant: Assistant) -> dict[str, Any]:
    """What decides about answers: the model to the bit, how it computes, how it is asked."""
    from lmm_jax.evaluation.runner import model_name

    digest = hashlib.blake2b(digest_size=8)
    for file in (*sorted(f for f in assistant.folder.iterdir() if f.is_file()), assistant.folder / "params/manifest.ocdbt"):
        digest.update(file.read_bytes())  # configuration, tokenizer, and what names all weights by their content
    return {
        "model": args.name or model_name(assistant.folder),
        "folder": str(assistant.folder.resolve()),
        "digest": digest.hexdigest(),
        "template": args.template or assistant.config.template,
        "dtype": str(assistant.engine.dtype),
        "quantize": args.quantize,
        "kv_cache": args.kv_cache,
    }


def _session(args: argparse.Namespace, assistant: Assistant, shard: str, names: Sequence[str]) -> dict[str, Any]:
    """What decides how fast answers come, and where to look if they should differ after all."""
    mesh = assistant.engine.mesh
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in ("lmm-jax", "jax", "flax")},
        "platform": mesh.devices.flat[0].platform,
        "devices": int(mesh.devices.size),
        "mesh": dict(mesh.shape),
        "batch_size": args.batch_size,
        "shard": shard,
        "benchmarks": names,
    }


def _label(words: wording.Wording) -> dict[str, str]:
    return {"name": words.name, "digest": words.digest}


def _judge(args: argparse.Namespace, shown: _Shown) -> Judge | None:
    if not args.judge:
        return None
    endpoint = Endpoint(args.judge_url, key_variable=args.judge_key)
    cache = args.out / "judge.jsonl"
    told = {"runs": args.judge_runs, "prices": tuple(args.judge_prices), "watch": shown}
    return Judge(args.judge, endpoint, cache, url=endpoint.base, **told)


class _Shown:
    """Calls and cost so far, in one line that is written over; in a log, a line now and then."""

    def __init__(self) -> None:
        self._text, self._next = "", time.monotonic() + _BETWEEN

    def __call__(self, usage: Usage) -> None:
        self._text = f"judge: {usage.calls} calls, {usage.cached} from disk, {usage.failures} failed, cost {usage.cost:.4f}"
        if sys.stderr.isatty():
            print(f"\r{self._text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() > self._next:
            self._next = time.monotonic() + _BETWEEN
            print(self._text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """The last line, and what follows goes below it."""
        if self._text:
            print(f"\r{self._text}" if sys.stderr.isatty() else self._text, file=sys.stderr, flush=True)
            self._text = ""


def _wording(args: argparse.Namespace) -> wording.Wording:
    return wording.load(args.wording) if args.wording else wording.own()


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: expected the shard's number and how many there are, as 1/4")
    return int(match[1]) - 1, int(match[2])


def _some(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:_LISTED])) + (" …" if len(items) > _LISTED else "")


def add_parser(commands: Any) -> None:
    """Adds ``eval`` to the command line."""
    parser = commands.add_parser("eval", help="run benchmarks", description="Benchmarks: answer, then score, then table.")
    parts = parser.add_subparsers(dest="part", required=True, metavar="COMMAND")
    names = f"benchmarks, as `lmm eval list` shows them, or {' or '.join(registry.GROUPS)} for all of these"

    def part(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = parts.add_parser(name, help=text, description=(run.__doc__ or "").splitlines()[0])
        made.set_defaults(run=run)
        return made

    one = part("answer", answer, "ask a model the questions of benchmarks")
    one.add_argument("benchmarks", nargs="+", metavar="BENCH", help=names)
    one.add_argument("--model", metavar="DIR", help="a model folder, made by python -m conversion from-hf")
    one.add_argument("--name", metavar="NAME", help="of the model in tables (its folder's)")
    one.add_argument("--mesh", metavar="SIZES", help="devices of this host, as data=1,fsdp=8,tensor=1 (one device)")
    one.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic (by platform)")
    one.add_argument("--quantize", choices=QUANTIZATIONS, help="keep the decoder's weights in so many bits (no)")
    one.add_argument("--kv-cache", choices=KV_CACHES, help="keep the decoder's keys and values so (as computed)")
    one.add_argument("--template", choices=TEMPLATES, help="prompt template (the model's own)")
    one.add_argument("--batch-size", type=int, default=32, metavar="N", help="questions at once (32)")
    one.add_argument("--max-new-tokens", type=int, metavar="N", help="longest reply (the benchmark's)")
    one.add_argument("--shard", default="1/1", metavar="I/N", help="answer the I-th of N parts (all)")
    _common(one, "count questions whose pictures are not there as wrong")

    two = part("score", score, "figures from answers")
    two.add_argument("benchmarks", nargs="+", metavar="BENCH", help=names)
    judge = two.add_argument_group("judge, for benchmarks that an LLM judges")
    judge.add_argument("--judge", metavar="MODEL", help="its name at the endpoint")
    judge.add_argument("--judge-url", default=OPENAI, metavar="URL", help=f"an OpenAI-compatible endpoint ({OPENAI})")
    judge.add_argument("--judge-key", default="OPENAI_API_KEY", metavar="VAR", help="environment variable with its key")
    judge.add_argument("--judge-runs", type=int, default=1, metavar="N", help="judgings that are averaged (1)")
    judge.add_argument(
        "--judge-prices", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million tokens"
    )
    _common(two, "count missing answers as wrong")

    three = part("export", export, "files to hand in")
    three.add_argument("benchmarks", nargs="+", metavar="BENCH", help=names)
    _common(three, "count missing answers as empty")
    for made in (two, three):
        made.add_argument("--answers", type=Path, metavar="FILE", help="an answers file in the published form (the run's)")
        made.add_argument("--name", metavar="NAME", help="of the model in tables, with --answers (the file's)")

    four = part("table", table, "runs side by side, and published figures")
    four.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    four.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    four.add_argument("--html", type=Path, metavar="FILE", help="write a page with examples there")
    four.add_argument("--examples", type=int, default=6, metavar="N", help="right and wrong answers to show, of each (6)")
    _places(four)

    part("list", listing, "all benchmarks")


def _common(parser: argparse.ArgumentParser, missing: str) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--allow-missing", action="store_true", help=missing)
    parser.add_argument("--wording", type=Path, metavar="FILE", help="published instructions and judge messages (our own)")
    _places(parser)


def _places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/eval"), metavar="ROOT", help="benchmarks' files (data/eval)")
    parser.add_argument("--folder", action="append", default=[], metavar="BENCH=DIR", help="where one lies instead")

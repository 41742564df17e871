"""Questions per second of `lmm eval answer`, beside asking one by one: ``python benchmarks/eval_throughput.py``.

500 questions about 50 pictures of the demo world, answered by what stands under `lmm eval answer` (pictures read from their
files, answers written to a run folder); by it without its cache of pictures; and by one `ask` after the other that starts
without anything remembered of the picture. The three take turns in one run, after one turn each in which all is compiled;
loading the model is no part of it. All must give the same answers. Prints a table, writes benchmarks/eval_throughput.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from machine import machine

import lmm_jax
from lmm_jax.demo import world
from lmm_jax.demo.asking import ask_several
from lmm_jax.demo.options import SceneView
from lmm_jax.demo.questions import FORMS
from lmm_jax.evaluation import registry, runs
from lmm_jax.evaluation.benchmark import Record
from lmm_jax.evaluation.runner import Asking, answer
from lmm_jax.inference.assistant import Assistant, Question

RESULT = Path(__file__).with_suffix(".json")
PICTURES, EACH, LONGEST = 50, 10, 16
SEED = 500


def main() -> None:
    """Draws, warms up, measures, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder (the demo model)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions at once (32)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (5)")
    args = parser.parse_args()
    cached, uncached = lmm_jax.load(args.model), lmm_jax.load(args.model, prefix_cache_bytes=0)
    with tempfile.TemporaryDirectory() as folder:
        records = draw(Path(folder))
        ways: dict[str, Callable[[], list[str]]] = {
            "lmm eval answer": lambda: batched(cached, records, Path(folder), args.batch_size),
            "lmm eval answer, no cache of pictures": lambda: batched(uncached, records, Path(folder), args.batch_size),
            "one by one": lambda: one_by_one(cached, records),
        }
        replies = {name: way() for name, way in ways.items()}
        differing = sum(len(set(of)) > 1 for of in zip(*replies.values()))
        if differing:
            sys.exit(f"{differing} of {len(records)} answers depend on how they are asked for")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    rates = {name: sorted(len(records) / s for s in of) for name, of in seconds.items()}
    figures = {
        name: {"median": round(statistics.median(r), 2), "lowest": round(r[0], 2), "highest": round(r[-1], 2)}
        for name, r in rates.items()
    }
    print(markdown(figures))
    about = {"questions": len(records), "pictures": PICTURES, "batch_size": args.batch_size, "rounds": args.rounds}
    where = machine("jax", "flax") | {"device": jax.devices()[0].device_kind}
    result = {"unit": "questions/s", **about, "figures": figures, "machine": where, "date": str(datetime.date.today())}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def draw(folder: Path) -> list[Record]:
    """The questions; of each picture as many."""
    records: list[Record] = []
    for number in range(PICTURES):
        rng = np.random.default_rng((SEED, number))
        scene = world.make_scene(rng, (3, world.MOST_OBJECTS))
        world.draw(scene.background, scene.things).save(folder / f"{number}.png")
        for asked in ask_several(SceneView(scene), FORMS, EACH, rng, {}):
            record = Record(len(records), asked.text, images=(str(folder / f"{number}.png"),))
            records.append(record)
    assert len(records) == PICTURES * EACH
    return records


def batched(assistant: Assistant, records: list[Record], folder: Path, batch_size: int) -> list[str]:
    """As `lmm eval answer` does it, into a new run folder, with nothing remembered from before."""
    assistant.engine.images.prefixes.clear()
    with tempfile.TemporaryDirectory(dir=folder) as run:
        answers = runs.Answers(Path(run), registry.benchmarks()["demo"])
        answer(assistant, records, answers, Asking(batch_size, LONGEST, progress=False), "")
        found = answers.read()
    return [found[record.key][0] for record in records]


def one_by_one(assistant: Assistant, records: list[Record]) -> list[str]:
    """Each on its own."""
    replies = []
    for record in records:
        assistant.engine.images.prefixes.clear()
        replies += assistant.ask_batch([Question(record.text, record.images)], max_new_tokens=LONGEST)
    return replies


def markdown(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a table."""
    base = figures["one by one"]["median"]
    lines = ["| way | questions/s (lowest to highest turn) | times one by one |", "|---|---|---|"]
    for name, of in figures.items():
        lines.append(
            f"| {name} | {of['median']:.1f} ({of['lowest']:.1f} to {of['highest']:.1f}) | {of['median'] / base:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

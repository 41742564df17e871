"""From nothing to the first answer: ``python benchmarks/startup.py``.

Each turn is a new process that asks about one picture: once with an empty cache of compiled programs (cold), then again with
what that left (warm). Files are in the system's cache in both. Times are of the whole process, as its shell sees it, and
inside it of imports, of loading, and of the first answer. Prints a table, writes benchmarks/startup.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

from lmm_jax.demo import MODEL

RESULT = Path(__file__).with_suffix(".json")
PICTURE = Path(__file__).parents[1] / "examples" / "shapes.png"
STEPS = ("imports", "loading", "first answer", "whole process")

PROGRAM = """
import json, sys, time
marks = [time.perf_counter()]
import lmm_jax
import lmm_jax.inference.loading
marks.append(time.perf_counter())
model = lmm_jax.load(sys.argv[1])
marks.append(time.perf_counter())
answer = model.ask("What colour is the circle?", images=[sys.argv[2]], max_new_tokens=16)
marks.append(time.perf_counter())
print(json.dumps([later - earlier for earlier, later in zip(marks, marks[1:])]))
"""


def main() -> None:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="a model folder (the demo model)")
    parser.add_argument("--rounds", type=int, default=5, help="cold and warm starts (5)")
    args = parser.parse_args()
    start(args.model, None)  # files into the system's cache
    seconds: dict[str, list[list[float]]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in seconds:
                seconds[kind].append(start(args.model, cache))
    found = {
        kind: {step: round(statistics.median(times), 2) for step, times in zip(STEPS, zip(*runs))}
        for kind, runs in seconds.items()
    }
    print("| seconds | " + " | ".join(STEPS) + " |\n|---|" + "---:|" * len(STEPS))
    for kind, steps in found.items():
        print(f"| {kind} | " + " | ".join(f"{steps[step]:.2f}" for step in STEPS) + " |")
    result = {"unit": "s", "median_of": args.rounds, **found, "machine": machine("jax", "jaxlib", "flax", "transformers")}
    result["date"] = datetime.date.today().isoformat()
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def start(model: str, cache: str | None) -> list[float]:
    """Seconds of each of STEPS in a new process, whose compiled programs are kept in `cache`."""
    environment = dict(os.environ) | ({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model, str(PICTURE)], env=environment, capture_output=True, text=True, check=False
    )
    whole = time.perf_counter() - begun
    if done.returncode:
        sys.exit(done.stderr)
    return [*json.loads(done.stdout), whole]


if __name__ == "__main__":
    main()

"""From nothing to the first answer: ``python benchmarks/startup.py``.

Each turn is a new process that asks about one picture: once with an empty cache of compiled programs (cold), then again with
what that left (warm). Files are in the system's cache in both. Times are of imports, of loading and of the first answer in a
program that uses the library, of the three together, and of the whole command `lmm ask`, as its shell sees it, in turns of its
own. Prints a table, writes benchmarks/startup.json.
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
STEPS = ("imports", "loading", "first answer", "together", "lmm ask")
QUESTION = "What colour is the circle?"

PROGRAM = """
import json, sys, time
marks = [time.perf_counter()]
import lmm_jax
import lmm_jax.inference.loading
marks.append(time.perf_counter())
model = lmm_jax.load(sys.argv[1])
marks.append(time.perf_counter())
answer = model.ask(sys.argv[3], images=[sys.argv[2]], max_new_tokens=16)
marks.append(time.perf_counter())
print(json.dumps([later - earlier for earlier, later in zip(marks, marks[1:])]))
"""


def main() -> None:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="a model folder (the demo model)")
    parser.add_argument("--rounds", type=int, default=5, help="cold and warm starts (5)")
    args = parser.parse_args()
    library(args.model, {})  # files into the system's cache
    seconds: dict[str, list[list[float]]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            for kind in seconds:
                steps = library(args.model, {"JAX_COMPILATION_CACHE_DIR": one})
                whole = command(args.model, {"JAX_COMPILATION_CACHE_DIR": other})
                seconds[kind].append([*steps, sum(steps), whole])
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


def library(model: str, environment: dict[str, str]) -> list[float]:
    """Seconds of the first three of STEPS in a new process."""
    return json.loads(run(["-c", PROGRAM, model, str(PICTURE), QUESTION], environment))


def command(model: str, environment: dict[str, str]) -> float:
    """Seconds of the command."""
    begun = time.perf_counter()
    run(["-m", "lmm_jax", "ask", "--model", model, "--image", str(PICTURE), QUESTION], environment)
    return time.perf_counter() - begun


def run(arguments: list[str], environment: dict[str, str]) -> str:
    """What Python prints."""
    done = subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else sys.exit(done.stderr)


if __name__ == "__main__":
    main()

"""What LLVM's optimisation is worth on a processor: ``python benchmarks/optimization_level.py``.

Each program of inference is compiled at level 3, XLA's own choice, and at level 1, which `lmm_jax.inference.compiling` asks
for; then both run in turn. Random weights, of the demo model's sizes and of those of `inference_speed.py`. Prints a table of
seconds to compile and of the ratio of the times to run, level 1 over level 3, the median of the turns; writes
benchmarks/optimization_level.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from inference_speed import MODEL
from machine import machine, threads

from lmm_jax import checkpoint, sharding
from lmm_jax.config import ModelConfig
from lmm_jax.demo import MODEL as DEMO
from lmm_jax.inference.engine import Engine
from lmm_jax.models import apart
from lmm_jax.models.llava_mini import init_params

RESULT = Path(__file__).with_suffix(".json")
LEVELS = (3, 1)
STEPS = 8  # tokens of each row
Program = tuple[str, Any, Callable[[], tuple]]  # name, lowered, its arguments


def main() -> None:
    """Measures, prints, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each program (15)")
    rounds = parser.parse_args().rounds
    jax.config.update("jax_enable_compilation_cache", False)
    models = {"demo model": checkpoint.read_config(DEMO), "model of inference_speed.py": MODEL}
    found = {f"{model}: {name}": figures for model, c in models.items() for name, figures in of_model(c, rounds)}
    print(f"| {threads()} cores | compiling at level 3 | at level 1 | running, level 1 / level 3 |\n|---|---:|---:|---:|")
    for name, figures in found.items():
        seconds = " | ".join(f"{s:.2f} s" for s in figures["compile_seconds"])
        print(f"| {name} | {seconds} | {figures['run_ratio']:.2f} |")
    result = {"median_of": rounds, "programs": found, "machine": machine("jax", "jaxlib")}
    RESULT.write_text(json.dumps(result | {"date": datetime.date.today().isoformat()}, indent=2) + "\n")


def of_model(config: ModelConfig, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of each program of a model."""
    mesh = sharding.make_mesh()
    params = apart.as_loaded(init_params(config, mesh), mesh)
    with jax.set_mesh(mesh):
        for name, lowered, arguments in programs(Engine(config, params, mesh, dtype=np.float32), config):
            yield name, compare(lowered, arguments, rounds)


def programs(engine: Engine, config: ModelConfig) -> Iterator[Program]:
    """Those that do the work: pictures into the encoder, a prompt into the decoder, tokens out of it."""
    side = config.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, side, side, 3), np.uint8)
    yield "a picture", engine.images._encode.lower(engine.params, pixels), lambda: (engine.params, pixels)
    slots = engine.programs
    x = jax.numpy.ones((1, 64, config.decoder.hidden_size))
    prompt = (engine.params, x, np.zeros(1, np.int32), np.full(1, 60, np.int32))
    yield "a prompt of 64", slots.prefill.lower(*prompt), lambda: prompt
    for rows in (1, 32):
        state = slots.empty(rows, 256, 256, False)
        state = state.replace(position=state.position + 100, limit=state.limit + 256, done=~state.done)
        kept = jax.device_get(state)
        told = (np.zeros(0, np.int32), np.int32(STEPS), np.int32(rows))
        lowered = slots.decode.lower(engine.params, state, *told)
        yield (
            f"{STEPS} tokens of {rows} rows",
            lowered,
            lambda kept=kept, told=told: (
                engine.params,
                jax.device_put(kept),
                *told,
            ),
        )


def compare(lowered: Any, arguments: Callable[[], tuple], rounds: int) -> dict[str, Any]:
    """Seconds to compile at each of LEVELS, and how long the last runs beside the first."""
    compiled, compile_seconds = {}, []
    for level in LEVELS:
        start = time.perf_counter()
        compiled[level] = lowered.compile(compiler_options={"xla_backend_optimization_level": level})
        compile_seconds.append(round(time.perf_counter() - start, 2))
    times: dict[int, list[float]] = {level: [] for level in LEVELS}
    for _ in range(rounds + 1):  # the first is thrown away
        for level, program in compiled.items():
            given = jax.block_until_ready(arguments())
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            times[level].append(time.perf_counter() - start)
    ratios = [light / full for full, light in zip(*(times[level][1:] for level in LEVELS))]
    milliseconds = [round(1000 * statistics.median(times[level][1:]), 3) for level in LEVELS]
    return {"compile_seconds": compile_seconds, "run_ms": milliseconds, "run_ratio": round(statistics.median(ratios), 3)}


if __name__ == "__main__":
    main()

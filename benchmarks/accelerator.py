"""First token and decoding of LLaVA-Mini on a GPU or TPU, beside what its memory allows:

    python benchmarks/accelerator.py --bandwidth 4800

gives LLaMA-3.1-8B's sizes random weights in bfloat16 on one device (of 24 GB at least; 4,800 GB/s are an H200's). It measures
image and question to first token from uint8 pixels on the host, decoding of one row and of many, what of the device's memory
bandwidth that is (a step reads the decoder's weights once, and each row's keys and values), and looks in the compiled decode
step for copies of a layer's weights. Prints a table and adds it to benchmarks/accelerator.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from long_video import TEXT, config_of, random_params, request
from machine import machine

from lmm_jax import sharding
from lmm_jax.analysis.rehearsal import device_bytes, rehearse
from lmm_jax.inference.buckets import length_bucket
from lmm_jax.inference.engine import Engine
from lmm_jax.inference.sampling import Sampling
from lmm_jax.inference.slots import Slots
from lmm_jax.models.kv_cache import position_bytes

RESULT = Path(__file__).with_suffix(".json")
STEPS = 128  # decode steps that are timed together
LENGTH = 512  # positions of a slot
_HOLDS = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "constant", "conditional"}  # make no copy


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="llava-mini-llama-3.1-8b", help="named sizes of a model (LLaMA-3.1-8B's)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of arithmetic (bfloat16)")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights in so many bits")
    parser.add_argument("--kv-cache", choices=("bfloat16", "int8"), help="what keys and values are kept in (as computed)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the device's memory, its maker's (H200: 4800)")
    parser.add_argument("--rows", type=int, default=32, help="that are decoded together (32)")
    parser.add_argument("--rounds", type=int, default=20, help="of each (20)")
    args = parser.parse_args()
    config, mesh = config_of(args.size, 1), sharding.make_mesh(None, jax.devices()[:1])
    params = random_params(config, mesh, args)
    engine = Engine(config, params, mesh, dtype=args.dtype, kv_cache=args.kv_cache, prefix_cache_bytes=0)
    found: dict[str, Any] = {"first_token_seconds": first_token(engine, args.rounds)}
    for rows in (1, args.rows):
        found[f"rows_{rows}"] = decoding(engine, rows, args.rounds, args.bandwidth)
    found["times_one_row"] = found[f"rows_{args.rows}"]["tokens_per_second"] / found["rows_1"]["tokens_per_second"]
    found["copied_weights"] = copied_weights(engine, args)
    print(table(found, args.rows))
    told = {k: v for k, v in vars(args).items() if v is not None}
    of = {"device": jax.devices()[0].device_kind, "machine": machine("jax", "jaxlib", "flax")}
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept[" ".join(f"{k}={v}" for k, v in told.items())] = found | of | {"date": datetime.date.today().isoformat()}
    RESULT.write_text(json.dumps(kept, indent=2) + "\n")


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """Median, after one that is not counted."""
    took = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


def first_token(engine: Engine, rounds: int) -> float:
    """Seconds from a picture's pixels and a question to the first token."""
    side = engine.config.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (engine.config.tiles, side, side, 3), np.uint8)
    return seconds(lambda: next(engine.stream(request(pixels), ())), rounds)


def decoding(engine: Engine, rows: int, rounds: int, bandwidth: float | None) -> dict[str, float]:
    """Tokens a second of so many rows, and the share of the bandwidth in GB/s."""
    slots = Slots(engine.programs, engine.params, rows, LENGTH, LENGTH, np.array([], np.int32))
    length = TEXT + engine.config.tokens_per_image
    x = jax.numpy.zeros((1, length_bucket(length), engine.config.decoder.hidden_size), engine.dtype)
    took = []
    for _ in range(rounds + 1):
        slots.enter(x, [(row, 0, length, Sampling(STEPS + 1, ignore_eos=True)) for row in range(rows)])
        slots.tokens()  # waits
        start = time.perf_counter()
        slots.advance(STEPS)
        left = slots.leave()
        took.append(time.perf_counter() - start)
        assert len(left) == rows and all(len(tokens) == STEPS + 1 for _, tokens in left)
    step = statistics.median(took[1:]) / STEPS
    cache = position_bytes(engine.config.decoder, engine.programs.cache_dtype) * (length + STEPS // 2) * rows
    read = decoder_bytes(engine) + cache
    found = {"step_seconds": step, "tokens_per_second": rows / step, "bytes_per_step": read}
    return found | ({"share_of_bandwidth": read / step / (1e9 * bandwidth)} if bandwidth else {})


def decoder_bytes(engine: Engine) -> int:
    """Of the weights that a decode step reads: its layers, and what makes logits."""
    tied = engine.config.decoder.tie_word_embeddings
    parts = ("layers", "norm", "embed_tokens" if tied else "lm_head")
    return sum(device_bytes(x) for part in parts for x in jax.tree.leaves(engine.params[part]))


def copied_weights(engine: Engine, args: argparse.Namespace) -> list[str] | None:
    """What in the decode program makes an array of a layer's kernel's size; None where layers are not stacked."""
    if "stack" not in engine.params["layers"]:
        return None
    kernels = {math.prod(x.shape[1:]) for x in jax.tree.leaves(engine.params["layers"]["stack"]) if x.ndim > 2}
    side = engine.config.vision.image_size
    pixels = np.zeros((engine.config.tiles, side, side, 3), np.uint8)
    how = {"dtype": args.dtype, "quantize": args.quantize, "kv_cache": args.kv_cache}
    programs = rehearse(engine.config, [request(pixels)], engine.mesh, **how).programs
    (text,) = (p.text for p in programs if p.name == "decode")
    return [line for line, size in written(text) if size in kernels]


def written(program: str) -> Iterator[tuple[str, int]]:
    """Name and elements of each array that a compiled program writes to the device's main memory."""
    inside = set(re.findall(r"calls=%?([\w.-]+)", program))  # of fusions, whose parts are not written
    computation = ""
    for line in program.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*{$", line):
            computation = begins[1]
        found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\](\S*) ([\w-]+)\(", line)
        if found and computation not in inside and found[4] not in _HOLDS and "S(1)" not in found[3]:  # S(1): on-chip memory
            yield found[1], math.prod(int(n) for n in found[2].split(",") if n)


def table(found: dict[str, Any], rows: int) -> str:
    """As Markdown."""
    one, many = found["rows_1"], found[f"rows_{rows}"]
    lines = ["| what | measured |", "|---|---|"]
    lines.append(f"| picture and question to first token | {1e3 * found['first_token_seconds']:.2f} ms |")
    for label, of in (("one row", one), (f"{rows} rows", many)):
        share = f", {of['share_of_bandwidth']:.0%} of memory bandwidth" if "share_of_bandwidth" in of else ""
        lines.append(f"| decoding {label} | {of['tokens_per_second']:.1f} tokens/s{share} |")
    lines.append(f"| {rows} rows beside one | {found['times_one_row']:.1f} times the tokens/s |")
    copies = found["copied_weights"]
    told = "layers are not stacked" if copies is None else ", ".join(copies) or "none"
    return "\n".join([*lines, f"| copies of a layer's weights in the decode step | {told} |"])


if __name__ == "__main__":
    main()

"""What the shipped runs take on pods and clusters, before anyone pays for one:

    python benchmarks/scale.py                            estimates: all runs on all topologies, one run on 8 to 1,024 chips
    python benchmarks/scale.py --compile v5e-64 v5p-128   compiles every run for these (with libtpu, without a TPU)

Each prints tables, keeps its figures in benchmarks/scale.json and the settings that come out best in configs/ready.json, where
compiled ones go before estimated ones. What is compiled already is not compiled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from train.hardware import quiet_libtpu  # noqa: E402

quiet_libtpu()

from machine import machine  # noqa: E402

from train import compile, hardware, meshes, ready  # noqa: E402
from train.start import planned_config  # noqa: E402

RESULT, READY = Path(__file__).with_suffix(".json"), ROOT / "configs" / ready.FILE
RUNS = (
    "stage1_vicuna_7b",
    "stage1_llama_3_1_8b",
    "stage2_vicuna_7b",
    "stage2_llama_3_1_8b",
    "stage2_hd_vicuna_7b",
    "stage2_lora_vicuna_7b",
    "llava_v1_5_stage1_vicuna_7b",
    "llava_v1_5_vicuna_7b",
)
TOPOLOGIES = ("v5e-64", "v5e-256", "v5p-128", "v6e-64", "v6e-256", "a100-8", "a100-64", "h100-8", "h100-64")
HOW = ("mesh", "remat", "parts", "fits")
BOUND = ("step at least, s", "exchange at least, s", "MFU at most")
SCALED, SIZES = "stage2_llama_3_1_8b", (8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Estimates, or compiled figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="+", default=[], metavar="TOPOLOGY")
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS)
    args = parser.parse_args()
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {"compiled": {}, "estimated": {}}
    for run in args.runs if args.compile else ():
        for topology in args.compile:
            if topology not in kept["compiled"].setdefault(run, {}):
                print(f"\n## {run} on {topology}\n", flush=True)
                start = time.monotonic()
                figures = compile.run(config_of(run), topology, search=True)
                figures |= {"seconds": time.monotonic() - start, "machine": machine("jax", "libtpu")}
                kept["compiled"][run][topology] = figures
                write(kept)
    if args.compile:
        print("\n## Compiled\n")
        heads("run", "topology", *HOW, "memory, GB", "of", *BOUND, "compiled in, s")
        for run, found in kept["compiled"].items():
            for topology, f in found.items():
                memory = f"{f['memory']['peak'] / 1e9:.1f} | {f['memory']['of'] / 1e9:.1f}"
                print(f"| {run} | {topology} | {how(f)} | {memory} | {told(f)} | {f['seconds']:.0f} |")
    if not args.compile:
        kept["estimated"] |= {run: estimated(run) for run in args.runs}
        kept["scaling"] = scaling()
        write(kept)


def write(kept: dict[str, Any]) -> None:
    """All figures, and the settings that they speak for."""
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")
    settings: dict[str, Any] = {}
    for run in RUNS:
        for topology in TOPOLOGIES:
            found = kept["compiled"].get(run, {}).get(topology) or kept["estimated"].get(run, {}).get(topology)
            if found and found["fits"]:
                settings.setdefault(run, {})[topology] = {k: found[k] for k in ("mesh", "remat", "accumulation")}
    READY.write_text(json.dumps(settings, indent=1) + "\n")


def config_of(run: str) -> Any:
    """The configuration of a file in `configs/`."""
    return importlib.import_module(f"configs.{run}").get_config()


def estimated(run: str) -> dict[str, Any]:
    """The best mesh of every topology, and what it takes."""
    found = {}
    for topology in TOPOLOGIES:
        chip, devices, _ = hardware.parse(topology)
        found[topology] = row(best(run, chip, devices))
    print(f"\n## {run}, {config_of(run).data.batch_size} rows of {config_of(run).data.max_length} positions, a picture each\n")
    heads("topology", *HOW, "memory, GB", *BOUND)
    for topology, f in found.items():
        print(f"| {topology} | {how(f)} | {f['bytes'] / 1e9:.1f} | {told(f)} |", flush=True)
    return found


def scaling() -> dict[str, Any]:
    """One run on more and more chips; TPUs beyond a pod are several pods, which a network joins."""
    found: dict[str, Any] = {}
    print(f"\n## {SCALED} on 8 to 1,024 chips\n")
    heads("chip", "devices", *HOW, *BOUND, "share of exchange")
    for name in ("v5e", "v5p", "v6e", "h100"):
        for devices in SIZES:
            chip = hardware.CHIPS[name]
            if devices in chip.shapes:
                chip = hardware.with_links(chip, chip.shapes[devices])
            f = row(best(SCALED, chip, devices))
            found[f"{name} {devices}"] = f
            share = f["bound"]["exchange"] / f["bound"]["step"]
            print(f"| {name} | {devices} | {how(f)} | {told(f)} | {share:.0%} |", flush=True)
    return found


def best(run: str, chip: Any, devices: int) -> meshes.Candidate:
    """What `python -m train compile --search` would try first."""
    config = config_of(run)
    sizes = planned_config(config.start)
    shape, works = compile.planned(config, sizes, chip, 1, config.data.max_length, meshes.SEARCHED["remat"])
    return meshes.candidates(config, sizes, chip, devices, shape, works, meshes.SEARCHED["accumulation"])[0]


def row(c: meshes.Candidate) -> dict[str, Any]:
    """Its figures: bytes of a device, seconds."""
    held = dataclasses.asdict(c.held)
    bound = {"step": c.bound.step, **dataclasses.asdict(c.bound)}
    settings = {"mesh": c.mesh, "remat": c.remat, "accumulation": c.accumulation}
    return settings | {"fits": c.fits, "bytes": c.bytes, "held": held, "kept": c.kept, "bound": bound}


def heads(*columns: str) -> None:
    """The first two lines of a table."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def how(f: dict[str, Any]) -> str:
    """Four cells."""
    return f"{f['mesh']} | {f['remat']} | {f['accumulation']} | {'yes' if f['fits'] else 'no'}"


def told(f: dict[str, Any]) -> str:
    """Three cells."""
    b = f["bound"]
    return f"{b['step']:.2f} | {b['exchange']:.2f} | {b['mfu']:.0%}"


if __name__ == "__main__":
    os.chdir(ROOT)
    main()

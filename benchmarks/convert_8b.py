"""Time and memory of converting a full-size LLaVA-Mini (LLaMA-3.1-8B), there and back, and of loading it.

    python benchmarks/convert_8b.py --folder /a/disk/with/40/GB

makes a checkpoint with every name and shape of the published one (random bf16 values, shards of 5 GB), converts it to a
model folder, loads that, and converts it back, each in a process of its own, writes the figures to benchmarks/convert_8b.json,
and removes what it made. Loading takes turns with eight threads that do no more than read the same files: directly (O_DIRECT)
and over and over into the same few bytes ("reading"), which is all that the disk can do; directly into memory that holds them
all ("filling"), which the system has to supply; and there as any program reads, through the system's memory of files ("plain
filling"). None finds any of them in memory. Needs Linux, since peak memory is VmHWM, which counts mapped files too, and a file
system that allows O_DIRECT.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from machine import machine

from conversion.hf_config import model_to_hf
from conversion.names import table
from conversion.writers import Output, plan_shards, write_safetensors
from lmm_jax.config import named_sizes

SIZE = "llava-mini-llama-3.1-8b"
SHARD_BYTES = 5 * 10**9
RESULT = Path(__file__).with_suffix(".json")
_RUN = """
import sys
from conversion.__main__ import main
status = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(status)
"""
_LOAD = """
import sys, time
import jax
from lmm_jax import checkpoint
from lmm_jax.models.llava_mini import abstract_params
from lmm_jax.sharding import make_mesh

abstract = abstract_params(checkpoint.read_config(sys.argv[1]), make_mesh(), "bfloat16")
start = time.perf_counter()
params = jax.block_until_ready(checkpoint.load_params(sys.argv[1], abstract))
print(time.perf_counter() - start, sum(x.nbytes for x in jax.tree.leaves(params)))
"""
_READ = """
import concurrent.futures, mmap, os, pathlib, sys, time
way, block = sys.argv[2], 2**23
files = [p for p in pathlib.Path(sys.argv[1]).rglob("*") if p.is_file() and p.stat().st_size]
starts, end = {}, 0
for file in files:
    starts[file], end = end, end + -(-file.stat().st_size // block) * block
memory = mmap.mmap(-1, block if way == "reading" else end, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)  # as NumPy has its arrays
memory = memoryview(memory)
def read(file):
    done = 0
    source = os.open(file, os.O_RDONLY | (0 if way == "plain_filling" else os.O_DIRECT))
    while count := os.preadv(source, [memory[0 if way == "reading" else starts[file] + done :][:block]], done):
        done += count
        if count % 4096:
            break
    os.close(source)
    return done
start = time.perf_counter()
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    size = sum(pool.map(read, sorted(files, key=lambda p: -p.stat().st_size)))
print(time.perf_counter() - start, size)
"""


def generate(folder: Path) -> int:
    """Writes the checkpoint and returns its bytes; holds one tensor at a time."""
    config = named_sizes()[SIZE]
    block = np.random.default_rng(0).standard_normal(2**24, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)

    def output(index: int, name: str, shape: tuple[int, ...]) -> Output:
        def read() -> np.ndarray:  # the same random values over and over, starting elsewhere in each tensor
            return np.resize(np.roll(block, 1000 * index), shape).view(ml_dtypes.bfloat16)

        return Output(name, shape, np.dtype(ml_dtypes.bfloat16), read)

    outputs = [output(i, entry.tensor, entry.shape) for i, entry in enumerate(table(config))]
    shards = plan_shards(outputs, SHARD_BYTES)
    written: list[int] = []
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, written.append)
        weight_map |= {tensor.name: name for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(model_to_hf(config, "bfloat16", config.vision.name)))
    return sum(written)


def measure(command: str, src: Path, dst: Path) -> dict[str, float]:
    """Runs one conversion in a new process: its wall time in seconds and peak memory in GB (10^9 bytes)."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _RUN, command, str(src), str(dst)], stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", done.stderr)[1]) * 1024
    return {"seconds": round(seconds, 1), "peak_memory_gb": round(peak / 1e9, 2)}


def load(folder: Path, rounds: int) -> dict[str, float]:
    """GB/s of loading a model folder, and of eight threads that read its files, see above; medians."""
    programs = {"loading": _LOAD, "reading": _READ, "filling": _READ, "plain_filling": _READ}
    rates: dict[str, list[float]] = {way: [] for way in programs}
    for _ in range(rounds):
        for way, program in programs.items():
            forget(folder)
            done = subprocess.run([sys.executable, "-c", program, str(folder), way], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            seconds, size = map(float, done.stdout.split())
            rates[way].append(size / seconds / 1e9)
    return {f"{way}_gb_per_s": round(statistics.median(of), 2) for way, of in rates.items()}


def forget(folder: Path) -> None:
    """Drops a folder's files from the system's memory."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Generates, converts there, loads, converts back, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="where to put 37 GB for a while; not in memory")
    folder = Path(tempfile.mkdtemp(prefix="convert_8b-", dir=parser.parse_args().folder))
    try:
        source = folder / "hf"
        source.mkdir()
        size = generate(source)
        there = measure("from-hf", source, folder / "model")
        shutil.rmtree(source)
        loaded = load(folder / "model", rounds=5)
        back = measure("to-hf", folder / "model", folder / "back")
    finally:
        shutil.rmtree(folder)
    result = {
        "model": SIZE,
        "gigabytes": round(size / 1e9, 2),
        "from_hf": there,
        "load": loaded,
        "to_hf": back,
        "machine": machine("numpy", "safetensors", "tensorstore"),
    }
    result["date"] = datetime.date.today().isoformat()
    text = json.dumps(result, indent=2)
    RESULT.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Samples per second of whole training steps, beside a plain PyTorch loop:

    python benchmarks/train_speed.py --torch-python /path/to/python

prints a Markdown table and writes benchmarks/train_speed.json. The other interpreter needs torch and transformers; it runs
benchmarks/train_speed_torch.py, which says what that loop is. Both train the demo model's sizes in stage 2 (vision encoder
frozen) in float32 on the processor, from the same weights, on the same batches of the demo world, which lie in memory: a
step is batch to device, forward, backward, clipping, AdamW. The two take turns within one run, on a machine that should have
nothing else to do: where processors are shared, PyTorch's threads lose more, because they wait for one another by spinning.

Before anything is measured both take the same first steps, and their losses must agree: the work is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from machine import machine, threads  # noqa: E402
from published import to_hf_names  # noqa: E402
from twin import Theirs  # noqa: E402

from configs import demo  # noqa: E402
from configs.common import PROJECTOR, STAGE_2  # noqa: E402
from lmm_jax.config import IGNORE_LABEL, CompressorConfig, ModelConfig  # noqa: E402
from lmm_jax.demo.dataset import write_dataset  # noqa: E402
from lmm_jax.demo.tokenizer import write_tokenizer  # noqa: E402
from train.config import (  # noqa: E402
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    SourceConfig,
    StartConfig,
    TrainConfig,
)
from train.data import TrainData  # noqa: E402
from train.lengths import encode  # noqa: E402
from train.setup import abstract_state, initial_state, prepare  # noqa: E402
from train.step import join  # noqa: E402

RESULT = Path(__file__).with_suffix(".json")
BATCHES = 4
FIRST_STEPS = 2 * BATCHES  # whose losses are compared: the second half after all batches were learned from
TOLERANCE = 1e-4  # of a loss, in nats
V15 = demo.model()
MINI = dataclasses.replace(V15, compressor=CompressorConfig(1), prefusion_layers=3)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
      label: in the table.
      model: sizes.
      records: list of the demo world.
      rows: of a batch.
      length: decoder positions that rows are padded to.
    """

    label: str
    model: ModelConfig
    records: str
    rows: int
    length: int


CASES = {
    "pictures": Case("LLaVA-Mini, pictures", MINI, "images", 32, 112),
    "clips": Case("LLaVA-Mini, clips of 8 frames", MINI, "clips", 8, 112),
    "v15": Case("LLaVA-v1.5, pictures", V15, "images", 32, 176),
}


class Ours:
    """A run of `train` without its files: the real configuration, state, step and batches."""

    def __init__(self, case: Case, world: Path) -> None:
        """Everything up to compilation."""
        config = TrainConfig(
            folder=str(world),
            start=StartConfig(scratch=case.model, tokenizer=str(world / "tokenizer")),
            data=DataConfig(
                sources=(SourceConfig(str(world / f"{case.records}.json")),),
                batch_size=case.rows,
                max_length=case.length,
                buckets=(),
                cache=str(world / ".cache"),
            ),
            optimizer=OptimizerConfig(STAGE_2, warmup=0.0),
            compute=ComputeConfig(remat="none"),
        )
        self.setup = prepare(config)
        self.data = TrainData(config.data, case.model, self.setup.tokenizer, cache=world, progress=False)
        whole = [i for i, (_, records) in enumerate(self.data.plan) if (records >= 0).all()][:BATCHES]
        assert len(whole) == BATCHES, "the demo world has too few records"
        self.indices = whole
        with self.data.batches(self.setup.rows) as batches:
            arrays = {batch.index: batch.arrays for batch in (next(batches) for _ in range(max(whole) + 1))}
        self.batches = [arrays[i] for i in whole]
        steps = 10**6  # of the schedule: the learning rates stay at their peaks
        self.state, self.step = initial_state(self.setup, abstract_state(self.setup, steps)), self.setup.step_function(steps)
        self.done = 0

    def run(self, steps: int) -> dict[str, Any]:
        """Takes steps: seconds in all, loss of each."""
        losses, start = [], time.perf_counter()
        with jax.set_mesh(self.setup.mesh):
            for _ in range(steps):
                batch = self.setup.put(self.batches[self.done % BATCHES])
                self.state, metrics = self.step(self.state, batch)
                losses.append(metrics["loss"])
                self.done += 1
        jax.block_until_ready(self.state)
        return {"seconds": time.perf_counter() - start, "losses": [float(loss) for loss in losses]}

    def export(self, folder: Path) -> None:
        """Writes for the other side: configuration, weights under Hugging Face's names, batches as rows of tokens."""
        folder.mkdir()
        rates = {group.pattern: group.learning_rate for group in STAGE_2}
        config = {
            "model": dataclasses.asdict(self.setup.model.config),
            "projector_learning_rate": rates[PROJECTOR],
            "learning_rate": max(rate for rate in rates.values() if rate),
            "clip": self.setup.config.optimizer.clip,
        }
        (folder / "case.json").write_text(json.dumps(config))
        weights = to_hf_names(self.setup.model.config, join(self.state.trained, self.state.frozen))
        np.savez(folder / "weights.npz", **weights)
        for i, index in enumerate(self.indices):
            np.savez(folder / f"batch{i}.npz", **self.tokens(index), pixels=self.batches[i]["pixels"][:, :, 0])

    def tokens(self, index: int) -> dict[str, np.ndarray]:
        """ids and labels of a batch, (B,L) int64, padded to its longest row."""
        rows = []
        for number in self.data.plan[index][1]:
            source, i = self.data.locate(int(number))
            rows.append(encode(source.record(i), self.data.template, self.setup.tokenizer))
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        out = {"ids": np.zeros(shape, np.int64), "labels": np.full(shape, IGNORE_LABEL, np.int64)}
        for b, (ids, labels) in enumerate(rows):
            out["ids"][b, : len(ids)], out["labels"][b, : len(ids)] = ids, labels
        return out


def main() -> None:
    """Prepares, checks that both do the same, measures, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="interpreter that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side in each case (7)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn (20)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world, exported = Path(folder) / "world", Path(folder) / "exported"
        write_tokenizer(world / "tokenizer")
        write_dataset(world, images=200, clips=60, seed=0, turns=(4, 5))  # rows of about 100 positions
        exported.mkdir()
        ours = {name: Ours(case, world) for name, case in CASES.items()}
        for name, side in ours.items():
            side.export(exported / name)
        theirs = Theirs(args.torch_python, "train_speed_torch.py", exported)
        found = {name: first_steps(name, ours[name], theirs) for name in CASES}
        seconds = {(name, side): [] for name in CASES for side in ("jax", "torch")}
        for _ in range(args.rounds):
            for name in CASES:
                seconds[name, "jax"].append(ours[name].run(args.steps)["seconds"])
                seconds[name, "torch"].append(theirs.run(f"{name} {args.steps}")["seconds"])
        theirs.close()
    for (name, side), measured in seconds.items():
        rates = [CASES[name].rows * args.steps / s for s in measured]
        rates = {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}
        found[name][side] |= {what: round(rate, 2) for what, rate in rates.items()}
    print(markdown(found))
    result = {"unit": "samples/s", "rounds": args.rounds, "steps": args.steps, "cases": found}
    result |= {
        "machine": machine("jax", "jaxlib", "flax", "optax") | theirs.versions,
        "date": datetime.date.today().isoformat(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def first_steps(name: str, ours: Ours, theirs: Theirs) -> dict[str, Any]:
    """Compiles, warms up, and makes sure that both learn the same: what the first step took, how far losses are apart."""
    runs = {"jax": ours.run, "torch": lambda steps: theirs.run(f"{name} {steps}")}
    firsts = {side: run(1) for side, run in runs.items()}
    losses = {side: firsts[side]["losses"] + run(FIRST_STEPS - 1)["losses"] for side, run in runs.items()}
    apart = float(np.abs(np.subtract(losses["jax"], losses["torch"])).max())
    if not apart <= TOLERANCE:
        sys.exit(f"{CASES[name].label}: the two sides do not compute the same; losses {json.dumps(losses)}")
    figures = {side: {"first_step_seconds": round(first["seconds"], 2)} for side, first in firsts.items()}
    about = {"label": CASES[name].label, "rows": CASES[name].rows, "losses": [round(x, 4) for x in losses["jax"]]}
    return about | {"losses_apart": float(f"{apart:.1e}")} | figures


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The figures as a table."""
    lines = [
        f"| float32, {threads()} cores, samples/s (lowest to highest turn) | rows | lmm-jax | PyTorch | lmm-jax / PyTorch |",
        "|---|---|---|---|---|",
    ]
    for case in found.values():
        sides = case["jax"], case["torch"]
        rates = [f"{s['median']:.1f} ({s['lowest']:.1f} to {s['highest']:.1f})" for s in sides]
        ratio = sides[0]["median"] / sides[1]["median"]
        lines.append(f"| {case['label']} | {case['rows']} | {rates[0]} | {rates[1]} | {ratio:.2f} |")
    first = [" / ".join(f"{case[side]['first_step_seconds']:.1f}" for case in found.values()) for side in ("jax", "torch")]
    apart = max(case["losses_apart"] for case in found.values())
    lines += ["", f"First step, in seconds: {first[0]} (compilation), PyTorch {first[1]}."]
    return "\n".join([*lines, f"Losses of the first {FIRST_STEPS} steps are at most {apart:.1e} apart."])


if __name__ == "__main__":
    main()

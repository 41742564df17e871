"""The paper's own claim, in the demo world with equal training: ``python benchmarks/demo_claims.py``.

Arms differ in how a picture reaches the decoder: all tokens (LLaVA-v1.5), one token, one token and pre-fusion layers, more
tokens, and how pre-fusion layers start. All begin with the same encoder and decoder, trained from nothing with all tokens (run
1 of the demo model and 2,500 steps of run 2: about an hour on two CPU cores), and see the same pictures and questions, in the
same order, for the same number of steps. The command draws the world, too, and goes on where it was stopped; arms that are
measured are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import demo_accuracy  # noqa: E402
from machine import machine  # noqa: E402

import lmm_jax  # noqa: E402
from configs import demo, demo_1_easy, demo_2_world, demo_6_mini  # noqa: E402
from lmm_jax.demo.dataset import write_dataset, write_test_set  # noqa: E402
from lmm_jax.demo.tokenizer import write_tokenizer  # noqa: E402
from train.config import GroupConfig, StartConfig, TrainConfig  # noqa: E402
from train.loop import train  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
START = RESULTS.with_name("demo_claims_start")  # what the first hour gives; it is trained again where it is deleted
CACHE = f"{demo.FOLDER}/claims/lengths"
BUCKETS = (72, 104, 136, 168, 208, 256)  # for rows with 1 to 64 tokens of a picture
ALL_TOKENS = "all 64 tokens, no fusion (LLaVA-v1.5)"
ARMS: dict[str, dict[str, Any]] = {
    ALL_TOKENS: {},
    "1 token, no pre-fusion": {"compressor_size": 1},
    "1 token, 1 pre-fusion layer": {"compressor_size": 1, "prefusion_layers": 1},
    "1 token, 2 pre-fusion layers": {"compressor_size": 1, "prefusion_layers": 2},
    "1 token, 4 pre-fusion layers": {"compressor_size": 1, "prefusion_layers": 4},
    "4 tokens, 2 pre-fusion layers": {"compressor_size": 2, "prefusion_layers": 2},
    "16 tokens, 2 pre-fusion layers": {"compressor_size": 4, "prefusion_layers": 2},
    "1 token, 2 pre-fusion layers, random": {"compressor_size": 1, "prefusion_layers": 2, "prefusion_init": "random"},
    "1 token, 2 pre-fusion layers, identity": {"compressor_size": 1, "prefusion_layers": 2, "prefusion_init": "identity"},
}


def main() -> int:
    """Runs what is missing, then prints the table and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="of each arm (800)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data order and new weights (0)")
    parser.add_argument("--only", nargs="+", default=[], help="arms of these names, or whose names hold one of these words")
    parser.add_argument("--images", type=int, default=1000, help="fresh pictures to measure with (1000)")
    args = parser.parse_args()
    draw()
    if not START.exists():
        if not all(train(config) for config in beginning()):
            return 143
        shutil.copytree(Path(beginning()[-1].folder) / "model", START)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine("jax", "flax", "optax"), "arms": []}
    done = {(a["arm"], a["seed"], a["steps"]) for a in found["arms"]}
    for seed in args.seeds:
        for name, changes in ARMS.items():
            if (name, seed, args.steps) in done or not wanted(name, args.only):
                continue
            config, start = arm(name, changes, seed, args.steps), time.monotonic()
            if not train(config):
                return 143
            seconds = time.monotonic() - start
            right = measure(Path(config.folder) / "model", args.images)
            found["arms"].append({"arm": name, "seed": seed, "steps": args.steps, "seconds": round(seconds), "right": right})
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found["arms"]))
    plot(found["arms"])
    return 0


def wanted(name: str, only: list[str]) -> bool:
    """Whether an arm is to be run; a whole name means that arm alone, though others' names begin with it."""
    return not only or any(word == name if word in ARMS else word in name for word in only)


def draw() -> None:
    """The pictures of `examples/train_demo.py` that the runs here learn from."""
    folder = ROOT / demo.FOLDER
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        write_tokenizer(folder / "tokenizer")
    for world in ("easy", "held_out", "world"):
        if not (folder / world / "images.json").exists():
            write_dataset(folder / world, **demo.WORLDS[world] | {"clips": 0})


def beginning() -> tuple[TrainConfig, TrainConfig]:
    """Encoder and decoder that all arms begin with."""
    easy, world = demo_1_easy.get_config(), demo_2_world.get_config()
    return easy, dataclasses.replace(world, folder=f"{demo.FOLDER}/claims/beginning", max_steps=2500)


def arm(name: str, changes: dict[str, Any], seed: int, steps: int) -> TrainConfig:
    """The run of one arm; pictures only, since clips tell the same story at several times the cost."""
    base = demo_6_mini.get_config()
    frozen = "vision_tower/.*" + ("|compressor/pos_embed" if "compressor_size" in changes else "")
    groups = (GroupConfig(frozen), GroupConfig(rf"(?!{frozen}).*", 5e-4))
    return dataclasses.replace(
        base,
        folder=f"{demo.FOLDER}/claims/{'_'.join(name.replace(',', '').split())}_{seed}_{steps}",
        start=StartConfig(folder=str(START), seed=seed, **changes),
        data=dataclasses.replace(
            base.data, sources=demo.sources("world", "images"), epochs=1, seed=seed, cache=CACHE, buckets=BUCKETS
        ),
        optimizer=dataclasses.replace(base.optimizer, groups=groups),
        held_out=dataclasses.replace(base.held_out, sources=()),
        max_steps=steps,
    )


def measure(model: Path, images: int) -> dict[str, float]:
    """Part answered right, by type and in all."""
    with tempfile.TemporaryDirectory() as folder:
        write_test_set(folder, images=images, clips=0, seed=20261121)
        records = [json.loads(line) for line in (Path(folder) / "questions.jsonl").read_text().splitlines()]
        demo_accuracy.answer(lmm_jax.load(str(model)), Path(folder), records)
    guessed = {"image": dict.fromkeys([*{r["type"] for r in records}, "all"], 0.0)}
    return {name: round(right, 4) for name, (_, right, _) in demo_accuracy.table(records, guessed, "image").items()}


def table(arms: list[dict[str, Any]]) -> str:
    """Mean over seeds, and their range where there are several."""
    lines = ["| arm | right | seeds | seconds |", "|---|---|---|---|"]
    for name, of in grouped(arms).items():
        rights = [a["right"]["all"] for a in of]
        spread = f" ({min(rights):.1%} to {max(rights):.1%})" if len(of) > 1 else ""
        lines.append(
            f"| {name} | {sum(rights) / len(of):.1%}{spread} | {len(of)} | {sum(a['seconds'] for a in of) // len(of)} |"
        )
    return "\n".join(lines)


def grouped(arms: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Arms of most steps, by name."""
    most = max((a["steps"] for a in arms), default=0)
    return {name: of for name in ARMS if (of := [a for a in arms if a["arm"] == name and a["steps"] == most])}


def plot(arms: list[dict[str, Any]]) -> None:
    """A dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for row, (_, of) in enumerate(grouped(arms).items()):
        axes.scatter([100 * a["right"]["all"] for a in of], [row] * len(of), color="C0")
    axes.set_yticks(range(len(grouped(arms))), list(grouped(arms)))
    axes.invert_yaxis()
    axes.set_xlabel("answers right, %")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "demo_claims.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())

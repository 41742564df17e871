"""How well a model answers about the demo world: ``python benchmarks/demo_accuracy.py`` prints the README's table.

Pictures and clips are drawn afresh, of scenes that no training set of any seed has. An answer counts where it is exactly
right. Beside it: how far guessing from the question alone gets, and clips whose seconds are shuffled.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import av
import numpy as np
from tqdm import tqdm

import lmm_jax
from lmm_jax.demo import clip_questions, questions
from lmm_jax.demo.asking import ask_each, guess_rate
from lmm_jax.demo.clips import RATE, encode, make_clip
from lmm_jax.demo.dataset import write_test_set
from lmm_jax.demo.options import SceneView
from lmm_jax.demo.world import make_scene
from lmm_jax.inference.assistant import Assistant, Question

BATCH = 256
GUESSED_SCENES = 6000

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; writes figures to --json and answers to --answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model folder (the demo model)")
    parser.add_argument("--images", type=int, default=2000, help="pictures (2000)")
    parser.add_argument("--clips", type=int, default=500, help="clips (500)")
    parser.add_argument("--seed", type=int, default=20261120, help="of the scenes")
    parser.add_argument("--mesh", help="devices, as data=8")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--answers", type=Path, help="file for questions and answers, as JSON lines")
    args = parser.parse_args(arguments)
    model = lmm_jax.load(args.model, mesh=args.mesh)
    with tempfile.TemporaryDirectory() as folder:
        write_test_set(folder, images=args.images, clips=args.clips, seed=args.seed)
        records = [json.loads(line) for line in (Path(folder) / "questions.jsonl").read_text().splitlines()]
        answer(model, Path(folder), records)
        shuffled = [dict(r, video=_shuffled(Path(folder), r["video"])) for r in records if r["type"] == "order"]
        answer(model, Path(folder), shuffled)
    if args.answers:
        args.answers.write_text("".join(json.dumps(r) + "\n" for r in records))
    guessed = guess_rates()
    figures = {kind: table(records, guessed, kind) for kind in ("image", "video") if any(kind in r for r in records)}
    figures["order, frames shuffled"] = {"order": (len(shuffled), _right(shuffled), None)}
    print(markdown(figures))
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, **figures}, indent=2) + "\n")
    return 0


def answer(model: Assistant, folder: Path, records: list[Record]) -> None:
    """Adds what the model says to each record, as "said"."""
    for part in tqdm(list(_parts(records)), desc="asking", unit="batch", file=sys.stderr):
        asked = [Question(r["question"], *_medium(folder, r)) for r in part]
        for record, said in zip(part, model.ask_batch(asked, max_new_tokens=16)):
            record["said"] = said


def _medium(folder: Path, record: Record) -> tuple[list[str], str | None]:
    if "image" in record:
        return [str(folder / record["image"])], None
    return [], str(folder / record["video"])


def _parts(records: list[Record]) -> Iterator[list[Record]]:
    for start in range(0, len(records), BATCH):
        yield records[start : start + BATCH]


def _shuffled(folder: Path, video: str) -> str:
    """A copy of a clip whose seconds come in another order."""
    target = folder / video.replace("clips/", "shuffled-")
    if not target.exists():
        with av.open(str(folder / video)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        order = np.random.default_rng(int(Path(video).stem)).permutation(len(frames) // RATE)
        target.write_bytes(encode([frames[RATE * second + i] for second in order for i in range(RATE)]))
    return target.name


def guess_rates() -> dict[str, dict[str, float]]:
    """What a blind player reaches who has seen many questions: by medium, and by type or "all"."""
    rates = {}
    worlds = {
        "image": (make_scene, SceneView, questions.FORMS),
        "video": (make_clip, clip_questions.ClipView, clip_questions.FORMS),
    }
    for kind, (make, view, forms) in worlds.items():
        asked = []
        for number in range(GUESSED_SCENES):
            rng = np.random.default_rng((7, number))
            asked.append(ask_each(view(make(rng)), forms, rng))
        cut = GUESSED_SCENES * 3 // 4
        seen, new = ([q for scene in part for q in scene] for part in (asked[:cut], asked[cut:]))
        rates[kind] = guess_rate(seen, new)
    return rates


def table(records: list[Record], guessed: dict[str, dict[str, float]], kind: str) -> dict[str, tuple[int, float, float]]:
    """Type -> number of questions, part answered right, part guessed right."""
    by_type = collections.defaultdict(list)
    for record in records:
        if kind in record:
            by_type[record["type"]].append(record)
            by_type["all"].append(record)
    return {name: (len(of), _right(of), guessed[kind][name]) for name, of in sorted(by_type.items())}


def _right(records: list[Record]) -> float:
    return float(np.mean([r["said"].strip() == r["answer"] for r in records])) if records else float("nan")


def markdown(figures: dict[str, dict[str, tuple[int, float, float | None]]]) -> str:
    """The figures as a table."""
    lines = ["| questions | number | right | guessed without looking |", "|---|---|---|---|"]
    for kind, types in figures.items():
        for name, (count, right, guess) in types.items():
            label = kind if kind.startswith("order") else f"{kind}: {name}"
            lines.append(f"| {label} | {count} | {right:.1%} | {'' if guess is None else f'{guess:.1%}'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

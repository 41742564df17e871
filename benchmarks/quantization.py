"""What fewer bits do to answers: ``python benchmarks/quantization.py`` compares formats on the demo world.

For each format: part of the questions answered right; mean Kullback-Leibler divergence of the first word's probabilities from
float32's, in nats; part of the answers, and of descriptions of up to 64 words, that are the same; bytes of all parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import demo_accuracy
import jax
import numpy as np
from machine import machine

import lmm_jax
from lmm_jax.data.conversation import render
from lmm_jax.data.layout import Row
from lmm_jax.demo.dataset import write_test_set
from lmm_jax.inference.assistant import Assistant, Conversation, Question

FORMATS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, float32 arithmetic": {"dtype": "float32", "quantize": "int8"},
    "int4, float32 arithmetic": {"dtype": "float32", "quantize": "int4"},
    "float32, keys and values bfloat16": {"dtype": "float32", "kv_cache": "bfloat16"},
    "float32, keys and values int8": {"dtype": "float32", "kv_cache": "int8"},
}
BATCH = 32
SEED = 20261122


def main() -> int:
    """Prints the table and writes the JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model folder (the demo model)")
    parser.add_argument("--images", type=int, default=500, help="pictures (500)")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_test_set(folder, images=args.images, clips=0, seed=SEED)
        lines = (folder / "questions.jsonl").read_text().splitlines()
        first: tuple[np.ndarray, list[str], list[str]] | None = None
        for kind, settings in FORMATS.items():
            records = [json.loads(line) for line in lines]
            model = lmm_jax.load(args.model, **settings)
            demo_accuracy.answer(model, folder, records)
            logs, said = log_probabilities(model, folder, records), [r["said"] for r in records]
            described = descriptions(model, folder, records)
            first = first or (logs, said, described)
            found[kind] = {
                "right": float(np.mean([r["said"] == r["answer"] for r in records])),
                "divergence": float((np.exp(first[0]) * (first[0] - logs)).sum(-1).mean()),
                "same": float(np.mean([a == b for a, b in zip(said, first[1])])),
                "same_descriptions": float(np.mean([a == b for a, b in zip(described, first[2])])),
                "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.engine.params)),
            }
    print(table(found))
    result = {"questions": len(lines), "seed": SEED, "formats": found, "machine": machine("jax", "flax")}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


def log_probabilities(model: Assistant, folder: Path, records: list[dict[str, Any]]) -> np.ndarray:
    """Of the first word of each answer, (R,vocab) float64."""
    found = []
    for start in range(0, len(records), BATCH):
        asked = [
            model.extend(Conversation(), Question(r["question"], [str(folder / r["image"])])) for r in records[start:][:BATCH]
        ]
        spans = [render(c.messages, model.config.template, model.tokenizer, generate=True) for c in asked]
        rows = [Row(model.tokenizer.encode(s)[0], (1,)) for s in spans]
        logits, layout = model.engine.logits(rows, [c.media for c in asked])
        last = logits[np.arange(len(rows)), layout.lengths[: len(rows)] - 1].astype(np.float64)
        found.append(
            last - np.log(np.exp(last - last.max(-1, keepdims=True)).sum(-1, keepdims=True)) - last.max(-1, keepdims=True)
        )
    return np.concatenate(found)


def descriptions(model: Assistant, folder: Path, records: list[dict[str, Any]]) -> list[str]:
    """Of each picture, so that there are words that depend on keys and values that were kept."""
    pictures = sorted({r["image"] for r in records})
    return model.ask_batch([Question("Describe the picture.", [str(folder / p)]) for p in pictures], max_new_tokens=64)


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    lines = [
        "| kept in | right | divergence from float32, nats | same answers | same descriptions | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for kind, of in found.items():
        same = f"{of['same']:.1%} | {of['same_descriptions']:.1%}"
        lines.append(f"| {kind} | {of['right']:.1%} | {of['divergence']:.5f} | {same} | {of['bytes'] / 1e6:.1f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""The other side of benchmarks/train_speed.py: a plain PyTorch training loop of the same model on the same batches.

    echo "pictures 10" | python benchmarks/train_speed_torch.py FOLDER --threads 2

for each line on stdin, "CASE STEPS", takes so many steps and prints {"seconds": …, "losses": […]}: the model of torch_model.py
with fused AdamW.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_model import LlavaMini, answer_lines, load_weights


class Case:
    """A model, its optimiser and its batches, from what the driver wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        """Load all of it."""
        config = json.loads((folder / "case.json").read_text())
        self.model, self.clip = LlavaMini(config["model"]), config["clip"]
        load_weights(self.model, folder / "weights.npz")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        slow = set(self.model.mm_projector.parameters())
        groups = [
            {"params": [p for p in self.trained if p in slow], "lr": config["projector_learning_rate"]},
            {"params": [p for p in self.trained if p not in slow], "lr": config["learning_rate"]},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.batches = [dict(np.load(file)) for file in sorted(folder.glob("batch*.npz"))]
        self.done = 0

    def run(self, steps: int) -> dict[str, Any]:
        """Takes steps: seconds in all, loss of each."""
        losses, start = [], time.perf_counter()
        for _ in range(steps):
            batch = {name: torch.from_numpy(a) for name, a in self.batches[self.done % len(self.batches)].items()}
            loss = self.model(**batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, self.clip)
            self.optimizer.step()
            losses.append(loss.detach())
            self.done += 1
        return {"seconds": time.perf_counter() - start, "losses": [float(loss) for loss in losses]}


def start(folder: Path) -> Callable[[list[str]], dict[str, Any]]:
    """Cases are loaded when they are first asked for."""
    case = functools.cache(lambda name: Case(folder / name))
    return lambda words: case(words[0]).run(int(words[1]))


if __name__ == "__main__":
    answer_lines(__doc__, start)

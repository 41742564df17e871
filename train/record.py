"""What a run shows and writes down: a progress bar, `metrics.jsonl`, TensorBoard, Weights & Biases.

Only the first process writes. A run that goes on appends; of steps that are done again the last line counts.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from train.config import TrainConfig, to_json


class Recorder:
    """Writes to all of them."""

    def __init__(self, config: TrainConfig, *, first: int, total: int, writes: bool) -> None:
        """Opens the run's files.

        Args:
          config: of the run.
          first: steps done already.
          total: steps of the whole run.
          writes: whether this process is the one that does.
        """
        self._writes, self._wandb = writes, None
        if not writes:
            return
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        folder = Path(config.folder)
        folder.mkdir(parents=True, exist_ok=True)
        if config.record.wandb:
            self._wandb = _wandb(config)
        self._file = _whole_lines(folder / "metrics.jsonl")
        self._lines = self._file.open("a", encoding="utf-8", errors="backslashreplace")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self._bar = tqdm(total=total, initial=first, unit="step", desc=folder.name, dynamic_ncols=True, mininterval=1.0)

    def has(self, step: int, name: str) -> bool:
        """Whether that figure of that step is written down already; only known where this process writes."""
        if not self._writes:
            return False
        with self._file.open(encoding="utf-8") as lines:
            return any(entry["step"] == step and name in entry for entry in map(json.loads, lines))

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        if self._writes:
            self._bar.update(step - self._bar.n)

    def numbers(self, step: int, values: dict[str, float | None]) -> None:
        """Figures of step number `step`; None is not known."""
        if not self._writes:
            return
        known = {name: value for name, value in values.items() if value is not None}
        self._lines.write(json.dumps({"step": step, **known}) + "\n")
        self._lines.flush()
        for name, value in known.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(known, step=step)
        if "loss" in known:
            self._bar.set_postfix_str(f"loss {known['loss']:.4f}, {known['samples_per_s']:.1f} samples/s", refresh=False)

    def text(self, step: int, name: str, text: str) -> None:
        """Words, such as answers."""
        if not self._writes:
            return
        self._lines.write(json.dumps({"step": step, name: text}, ensure_ascii=False) + "\n")
        self._lines.flush()
        self._board.add_text(name, text, step)
        self._bar.write(f"step {step}, {name}:\n{text}")

    def close(self) -> None:
        """Closes the files."""
        if not self._writes:
            return
        self._bar.close()
        self._lines.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def _whole_lines(file: Path) -> Path:
    """Removes a line that a killed run left half written."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return file


def _wandb(config: TrainConfig) -> Any:
    import wandb

    name = Path(config.folder).name
    return wandb.init(project=config.record.wandb, name=name, id=name, resume="allow", config=to_json(config))

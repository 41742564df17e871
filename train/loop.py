"""A run: batches in, steps, figures, checkpoints, and a model folder at its end.

While a step runs on the device, the figures of the one before are read: the host never waits for the step it has just
started. All processes decide alike, because they decide by figures that the step has summed over all of them.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lmm_jax.errors import UserError
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.data import Batch, SkipReport, TrainData
from train.evaluate import HeldOut
from train.export import check_folder, write_model_folder
from train.flops import model_flops, peak_flops
from train.record import Recorder
from train.setup import Setup, abstract_state, initial_state, prepare
from train.start import tokenizer_folder
from train.step import TrainState

logger = logging.getLogger(__name__)


class DivergedError(Exception):
    """The loss is no number."""


def train(config: TrainConfig) -> bool:
    """Runs, or goes on with, a run. Returns whether it came to its end (and not to a request to stop).

    Raises:
      UserError: settings or data that cannot work, too many unusable records, another run in the folder.
      DivergedError: the loss is NaN or infinite; nothing of it is saved.
    """
    setup = prepare(config)
    check_folder(Path(config.folder) / "model")
    data = _data(setup)
    held, cache = config.held_out, Path(config.folder) / ".cache"
    held_out = HeldOut(setup, cache) if held.mixture or held.sources else None
    steps = min(len(data.plan), config.max_steps or len(data.plan))
    checkpoints = Checkpoints(config)
    try:
        state = _first_state(setup, checkpoints, steps)
        run = _Run(setup, data, held_out, checkpoints, steps, int(state.step))
        try:
            state, finished = run.go(state)
        finally:
            run.recorder.close()
    finally:
        checkpoints.close()
    if finished:
        export(setup, state)
    return finished


def export(setup: Setup, state: TrainState) -> Path:
    """Writes the model folder of a run."""
    config, folder = setup.config, Path(setup.config.folder) / "model"
    dtype = config.record.model_dtype or setup.model.dtype
    tokenizer = tokenizer_folder(config.start)
    write_model_folder(folder, setup.model.config, config.start, tokenizer, state.trained, state.frozen, dtype)
    return folder


def export_checkpoint(config: TrainConfig) -> Path:
    """The last checkpoint of a run as a model folder, whether it has come to its end or not.

    Raises:
      UserError: the run has no checkpoint.
    """
    setup = prepare(config)
    checkpoints = Checkpoints(config)
    try:
        if checkpoints.latest() is None:
            raise UserError(f"the run in {config.folder} has no checkpoint yet")
        state = _first_state(setup, checkpoints, 1)
    finally:
        checkpoints.close()
    return export(setup, state)


def _data(setup: Setup) -> TrainData:
    config, folder = setup.config, Path(setup.config.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be made ({error}): choose another one") from error
    first = jax.process_index() == 0
    report = SkipReport(folder / "skipped.jsonl") if first else None
    data = TrainData(config.data, setup.model.config, setup.tokenizer, cache=folder / ".cache", report=report, progress=first)
    if len(data.skipped_beforehand) > config.data.max_skipped * data.records:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in data.reasons().most_common())
        raise UserError(
            f"{len(data.skipped_beforehand)} of {data.records} records are unusable ({reasons}), more than data.max_skipped "
            f"{config.data.max_skipped} allows; they are listed in {folder / 'skipped.jsonl'}"
        )
    return data


def _first_state(setup: Setup, checkpoints: Checkpoints, steps: int) -> TrainState:
    abstract = abstract_state(setup, steps)
    state = initial_state(setup, abstract)
    if checkpoints.latest() is None:
        return state
    abstract = abstract.replace(frozen=state.frozen)
    del state  # its memory is needed
    restored = checkpoints.restore(abstract)
    logger.info("going on from step %d", checkpoints.latest())
    return restored


class _Run:
    """The part of a run between its first and its last step."""

    def __init__(
        self, setup: Setup, data: TrainData, held_out: HeldOut | None, checkpoints: Checkpoints, steps: int, first: int
    ) -> None:
        self.setup, self.config, self.data, self.held_out, self.checkpoints = setup, setup.config, data, held_out, checkpoints
        self.steps, self.first = steps, first
        folder = Path(self.config.folder)
        self.recorder = Recorder(self.config, first=first, total=steps, writes=jax.process_index() == 0)
        self.report = SkipReport(folder / f"skipped.{jax.process_index()}.jsonl")
        self.rates = setup.learning_rates(steps)
        self.window = _Window(setup)
        self.met = {"seen": len(data.skipped_beforehand), "skipped": len(data.skipped_beforehand)} | checkpoints.met()
        self.stop_asked = self.tracing = False
        self.saved_at = time.monotonic()

    def go(self, state: TrainState) -> tuple[TrainState, bool]:
        """All steps from the first on."""
        before = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            with jax.set_mesh(self.setup.mesh), self.data.batches(self.setup.rows, self.first) as batches:
                return self._steps(state, batches)
        finally:
            signal.signal(signal.SIGTERM, before)
            if self.tracing:  # the run ended, one way or another, inside the traced range
                jax.profiler.stop_trace()

    def _steps(self, state: TrainState, batches: Any) -> tuple[TrainState, bool]:
        function, pending = self.setup.step_function(self.steps), None
        for done in range(self.first, self.steps):
            self._profile(done, state)
            batch = next(batches)
            for skipped in batch.skipped:
                self.report(skipped)
            state, metrics = function(state, self.setup.put(batch.arrays) | self._wishes())
            wishes = self._look(pending) if pending else {}
            pending = (done + 1, batch, metrics)
            last = done + 1 == self.steps
            if last or wishes or self._due(done + 1):
                wishes |= self._look(pending)
                pending = None
                if last or wishes or _is_multiple(done + 1, self.config.record.checkpoint_steps):
                    self.checkpoints.save(state, done + 1, self.met)
                    self.saved_at = time.monotonic()
                self._evaluate(done + 1, state)
            if wishes.get("stop"):
                logger.warning("asked to stop: saved step %d of %d", done + 1, self.steps)
                return state, done + 1 == self.steps
        return state, True

    def _ask_to_stop(self, *_: Any) -> None:
        self.stop_asked = True

    def _wishes(self) -> dict[str, jax.Array]:
        """What this process wants all of them to do, so that the step adds it up."""
        minutes = self.config.record.checkpoint_minutes
        due = bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes
        return {"stop": self.setup.put_wish(self.stop_asked), "save": self.setup.put_wish(due)}

    def _due(self, step: int) -> bool:
        """Whether something needs the state of this very step."""
        every = (self.config.record.checkpoint_steps, self.config.held_out.every if self.held_out else 0)
        return any(_is_multiple(step, n) for n in every)

    def _look(self, pending: tuple[int, Batch, dict[str, jax.Array]]) -> dict[str, bool]:
        """Reads the figures of a step (and so waits for it), writes them down, and says what is wanted."""
        step, batch, metrics = pending
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(found["loss"]) or not math.isfinite(found["grad_norm"]):
            records = [int(n) for n in self.data.plan[batch.index][1] if n >= 0]
            saved = self.checkpoints.latest()
            raise DivergedError(
                f"loss {found['loss']} and gradient norm {found['grad_norm']} at step {step}, batch {batch.index} "
                f"({self._names(records)}): " + (f"the last checkpoint is step {saved}" if saved else "there is no checkpoint")
            )
        self.met["skipped"] += int(found["skipped"])
        self.met["seen"] += int(found["used"] + found["skipped"])
        self._refuse_too_many()
        self.window.add(batch, found)
        self.recorder.advance(step)
        if not step % self.config.record.log_steps or step in (self.steps, self.first + 1):
            rates = {f"learning_rate/{pattern}": float(rate(step - 1)) for pattern, rate in self.rates.items()}
            epoch = step / self.data.plan.steps_per_epoch
            self.recorder.numbers(step, self.window.close() | {"skipped": self.met["skipped"], "epoch": epoch} | rates)
        return {name: True for name in ("stop", "save") if found[name]}

    def _names(self, records: list[int]) -> str:
        some = []
        for record in records[:8]:
            source, i = self.data.locate(record)
            some.append(f"{Path(source.config.file).name} record {source.numbers[i]}")
        return ", ".join(some) + (f" and {len(records) - 8} more" if len(records) > 8 else "")

    def _refuse_too_many(self) -> None:
        """Stops where too many records are unusable; the first few hundred may be unlucky."""
        allowed, (seen, skipped) = self.config.data.max_skipped, (self.met["seen"], self.met["skipped"])
        if skipped > allowed * max(seen, min(1000, self.data.records)):
            raise UserError(
                f"{skipped} of {seen} records so far could not be read, more than data.max_skipped {allowed} "
                f"allows; they are listed in {self.config.folder}/skipped*.jsonl"
            )

    def _evaluate(self, step: int, state: TrainState) -> None:
        held = self.config.held_out
        if self.held_out is None or not (step == self.steps or _is_multiple(step, held.every)):
            return
        self.recorder.numbers(step, {"held_out_loss": self.held_out.loss(state)})
        if held.answers and jax.process_count() == 1:
            self.recorder.text(step, "answers", self.held_out.answers(state))

    def _profile(self, done: int, state: TrainState) -> None:
        """Traces the first process through the wanted steps, those of them that this start of the run comes by."""
        first, count = self.config.record.profile or (0, 0)
        wanted = first <= done < first + count and jax.process_index() == 0
        if wanted == self.tracing:
            return
        jax.block_until_ready(state)  # what was started before belongs to the steps before
        if wanted:
            jax.profiler.start_trace(str(Path(self.config.folder) / "profile"))
        else:
            jax.profiler.stop_trace()
        self.tracing = wanted


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Window:
    """Figures of the steps since the last line of metrics."""

    def __init__(self, setup: Setup) -> None:
        self._setup, c = setup, setup.config
        self._trained: Callable[[str], bool] = setup.trained.__contains__
        device = setup.mesh.devices.flat[0]
        peak = peak_flops(device.device_kind, setup.model.dtype)
        self._peak = peak * setup.mesh.size if peak else None
        self._rows = c.data.batch_size
        self._reset()

    def _reset(self) -> None:
        self._start, self._sums, self._slots, self._flops, self._steps = time.monotonic(), {}, 0, 0.0, 0

    def add(self, batch: Batch, found: dict[str, float]) -> None:
        """One step's."""
        b = batch.bucket
        found = found | {"nats": found["loss"] * found["labels"]}
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in found.items()}
        self._slots += self._rows * b.length
        self._steps += 1
        if self._peak:
            self._flops += model_flops(
                self._setup.model.config, rows=self._rows, images=b.images, length=b.length, fused=b.fused,
                targets=b.targets, trained=self._trained,
            )  # fmt: skip

    def close(self) -> dict[str, float | None]:
        """Means and rates since the last call."""
        seconds, s = time.monotonic() - self._start, self._sums
        figures = {
            "loss": s["nats"] / max(s["labels"], 1.0),
            "grad_norm": s["grad_norm"] / self._steps,
            "tokens_per_s": s["lengths"] / seconds,
            "samples_per_s": s["used"] / seconds,
            "seconds_per_step": seconds / self._steps,
            "padding": 1 - s["lengths"] / self._slots,
            "model_flops_utilisation": self._flops / seconds / self._peak if self._peak else None,
        }
        self._reset()
        return figures

"""A run: batches in, steps, figures, checkpoints, and a model folder at its end.

While a step runs on the device, the figures of the one before are read: the host never waits for the step it has just
started. All processes decide alike, because they decide by figures that the step has summed over all of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from lmm_jax import storage
from lmm_jax.errors import UserError
from train.checkpoints import Checkpoints, Identity
from train.config import TrainConfig
from train.data import Batch, SkipReport, TrainData, write_skipped
from train.evaluate import HeldOut
from train.export import check_folder, model_folder, write_model_folder
from train.flops import model_flops, peak_flops
from train.processes import locked, of_first, read_alike
from train.record import Recorder
from train.setup import Setup, abstract_state, digest, initial_params_of, initial_state, prepare
from train.start import tokenizer_folder
from train.step import Params, TrainState

logger = logging.getLogger(__name__)


class DivergedError(Exception):
    """The loss is no number."""


def train(config: TrainConfig) -> bool:
    """Runs, or goes on with, a run. Returns whether it came to its end (and not to a request to stop).

    Raises:
      UserError: settings or data that cannot work, too many unusable records, another run in the folder.
      DivergedError: the loss is NaN or infinite; nothing of it is saved.
      SystemExit: SIGTERM came before the first step.
    """
    setup, folder = prepare(config), Path(config.folder)
    if config.record.bucket:
        storage.check_writable(config.record.bucket, f".writable.{jax.process_index()}")
    check_folder(model_folder(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be made ({error}): choose another one") from error
    with _Sigterm() as sigterm, contextlib.ExitStack() as at_end:
        data, held_out = read_alike(lambda: _read(setup, at_end), lambda read: read[0].fingerprint)
        steps = min(len(data.plan), config.max_steps or len(data.plan))
        checkpoints = Checkpoints(config)
        at_end.callback(checkpoints.close)
        state, identity = _first_state(setup, checkpoints, steps, data.fingerprint)
        run = _Run(setup, data, held_out, checkpoints, steps, int(state.step), identity, sigterm)
        sigterm.deferred = True
        try:
            state, finished = run.go(state)
        finally:
            run.recorder.close()
        if finished:
            checkpoints.wait()  # so that a run killed from here on has only its model folder to write
            export(setup, state.trained, state.frozen)
    return finished


class _Sigterm:
    """Ends the program at once, and from when it is `deferred` only notes that it is `asked` to stop."""

    def __init__(self) -> None:
        self.asked = self.deferred = False

    def __enter__(self) -> _Sigterm:
        self._before = signal.signal(signal.SIGTERM, self._come)
        return self

    def _come(self, *_: Any) -> None:
        self.asked = True
        if not self.deferred:
            raise SystemExit(143)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def export(setup: Setup, trained: Params, frozen: Params) -> Path:
    """Writes the model folder of a run."""
    config, folder = setup.config, model_folder(setup.config)
    dtype = config.record.model_dtype or setup.model.dtype
    tokenizer = tokenizer_folder(config.start)
    write_model_folder(folder, setup.model.config, config.start, tokenizer, trained, frozen, dtype)
    return folder


def export_checkpoint(config: TrainConfig, step: int | None = None) -> Path:
    """A checkpoint of a run, the last one where no step is given, as its model folder; the run may be going on meanwhile.

    Raises:
      UserError: there is no such checkpoint.
    """
    setup = prepare(config)
    check_folder(model_folder(config))
    with contextlib.closing(Checkpoints(config, read_only=True)) as checkpoints:
        found = checkpoints.steps()
        if not found or step not in (None, *found):
            raise UserError(
                f"the run in {config.kept_in} has " + (f"checkpoints {found}, not {step}" if found else "no checkpoint yet")
            )
        abstract = abstract_state(setup, 1)
        frozen = initial_params_of(setup, abstract)[1]
        trained = checkpoints.trained(abstract.trained, found[-1] if step is None else step)
    return export(setup, trained, frozen)


def _read(setup: Setup, at_end: contextlib.ExitStack) -> tuple[TrainData, HeldOut | None]:
    """The run's records and the held-out ones; keeps other runs out of the folder."""
    config, folder = setup.config, Path(setup.config.folder)
    at_end.enter_context(locked(folder))
    first, cache, held = jax.process_index() == 0, folder / ".cache", config.held_out
    data = TrainData(config.data, setup.model.config, setup.tokenizer, cache=cache, progress=first)
    if first:
        write_skipped(folder / "skipped.jsonl", data.skipped_beforehand)
    if len(data.skipped_beforehand) > config.data.max_skipped * data.records:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in data.reasons().most_common())
        raise UserError(
            f"{len(data.skipped_beforehand)} of {data.records} records are unusable ({reasons}), more than data.max_skipped "
            f"{config.data.max_skipped} allows; they are listed in {folder / 'skipped.jsonl'}"
        )
    report = SkipReport(folder / f"skipped_held_out.{jax.process_index()}.jsonl")
    return data, HeldOut(setup, cache, report) if held.mixture or held.sources else None


def _first_state(setup: Setup, checkpoints: Checkpoints, steps: int, data: str) -> tuple[TrainState, Identity]:
    abstract = abstract_state(setup, steps)
    state = initial_state(setup, abstract)
    identity = {"training data": data, "frozen parameters": digest(state.frozen)}
    if checkpoints.latest() is None:
        return state, identity
    abstract = abstract.replace(frozen=state.frozen)
    del state  # its memory is needed
    restored = checkpoints.restore(abstract, identity)
    logger.info("going on from step %d", checkpoints.latest())
    return restored, identity


class _Run:
    """The part of a run between its first and its last step."""

    def __init__(
        self, setup: Setup, data: TrainData, held_out: HeldOut | None, checkpoints: Checkpoints, steps: int, first: int,
        identity: Identity, sigterm: _Sigterm,
    ) -> None:  # fmt: skip
        self.setup, self.config, self.data, self.held_out, self.checkpoints = setup, setup.config, data, held_out, checkpoints
        self.steps, self.first, self.identity, self.sigterm = steps, first, identity, sigterm
        folder = Path(self.config.folder)
        self.recorder = Recorder(self.config, first=first, total=steps, writes=jax.process_index() == 0)
        self.report = SkipReport(folder / f"skipped.{jax.process_index()}.jsonl")
        self.rates = setup.learning_rates(steps)
        self.window = _Window(setup)
        self.met = {"seen": 0, "skipped": 0} | checkpoints.met()  # not those that are skipped beforehand
        self.tracing = False
        self.saved_at = time.monotonic()

    def go(self, state: TrainState) -> tuple[TrainState, bool]:
        """All steps from the first on."""
        try:
            with jax.set_mesh(self.setup.mesh), self.data.batches(self.setup.rows, self.first) as batches:
                return self._steps(state, batches)
        finally:
            if self.tracing:  # the run ended, one way or another, inside the traced range
                jax.profiler.stop_trace()

    def _steps(self, state: TrainState, batches: Any) -> tuple[TrainState, bool]:
        function, pending = self.setup.step_function(self.steps), None
        if self.first and not of_first(self.recorder.has(self.first, "held_out_loss")):
            self._evaluate(self.first, state)  # which is what the run was stopped before, or in
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
                with self.window.paused():
                    if last or wishes or _is_multiple(done + 1, self.config.record.checkpoint_steps):
                        self.checkpoints.save(state, done + 1, self.met, self.identity)
                        self.saved_at = time.monotonic()
                    if not wishes.get("stop"):
                        self._evaluate(done + 1, state)
            if wishes.get("stop"):
                self._write(done + 1)
                logger.warning("asked to stop: saved step %d of %d", done + 1, self.steps)
                return state, done + 1 == self.steps
        return state, True

    def _wishes(self) -> dict[str, jax.Array]:
        """What this process wants all of them to do, so that the step adds it up."""
        minutes = self.config.record.checkpoint_minutes
        due = bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes
        return {"stop": self.setup.put_wish(self.sigterm.asked), "save": self.setup.put_wish(due)}

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
        if not step % self.config.record.log_steps or step in (1, self.steps):
            self._write(step)
        return {name: True for name in ("stop", "save") if found[name]}

    def _write(self, step: int) -> None:
        """A line of figures of the steps since the last one, if there were any."""
        if self.window.steps:
            rates = {f"learning_rate/{pattern}": float(rate(step - 1)) for pattern, rate in self.rates.items()}
            skipped = {"skipped": len(self.data.skipped_beforehand) + self.met["skipped"]}
            epoch = {"epoch": step / self.data.plan.steps_per_epoch}
            self.recorder.numbers(step, self.window.close() | skipped | epoch | rates)

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
                f"the media of {skipped} of {seen} records so far could not be read, more than data.max_skipped {allowed} "
                f"allows; they are listed in {self.config.folder}/skipped*.jsonl"
            )

    def _evaluate(self, step: int, state: TrainState) -> None:
        held = self.config.held_out
        if self.held_out is None or not (step == self.steps or _is_multiple(step, held.every)):
            return
        figures = self.held_out.loss(state)
        self.recorder.numbers(step, figures)
        if "held_out_skipped" in figures:
            logger.warning("%d held-out records could not be read, see skipped_held_out*.jsonl", figures["held_out_skipped"])
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
        self._start, self._sums, self._slots, self._flops, self.steps = time.monotonic(), {}, 0, 0.0, 0

    def add(self, batch: Batch, found: dict[str, float]) -> None:
        """One step's."""
        b = batch.bucket
        found = found | {"nats": found["loss"] * found["labels"]}
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in found.items()}
        self._slots += self._rows * b.length
        self.steps += 1
        if self._peak:
            self._flops += model_flops(
                self._setup.model.config, rows=self._rows, images=b.images, length=b.length, fused=b.fused,
                targets=b.targets, trained=self._trained,
            )  # fmt: skip

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that no rate counts."""
        start = time.monotonic()
        yield
        self._start += time.monotonic() - start

    def close(self) -> dict[str, float | None]:
        """Means and rates since the last call."""
        seconds, s = time.monotonic() - self._start, self._sums
        figures = {
            "loss": s["nats"] / max(s["labels"], 1.0),
            "grad_norm": s["grad_norm"] / self.steps,
            "tokens_per_s": s["lengths"] / seconds,
            "samples_per_s": s["used"] / seconds,
            "seconds_per_step": seconds / self.steps,
            "padding": 1 - s["lengths"] / self._slots,
            "model_flops_utilisation": self._flops / seconds / self._peak if self._peak else None,
        }
        self._reset()
        return figures

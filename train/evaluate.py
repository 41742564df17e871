"""Held-out records, looked at while training: their loss, and some answers in words."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import jax

from lmm_jax import storage
from lmm_jax.data.conversation import count_placeholders
from lmm_jax.data.frames import video_file
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Assistant
from lmm_jax.inference.engine import Engine
from train.config import DataConfig, TrainConfig
from train.data import TrainData
from train.records import Record, Skipped
from train.setup import Setup
from train.start import tokenizer_folder
from train.step import TrainState, eval_step, join

logger = logging.getLogger(__name__)


class HeldOut:
    """The held-out part of a run's data."""

    def __init__(self, setup: Setup, cache: Path, report: Callable[[Skipped], None]) -> None:
        """Reads the records; their pictures are read when they are looked at.

        Args:
          setup: of the run.
          cache: folder of token counts.
          report: is told of every record that cannot be used.

        Raises:
          UserError: see `data.TrainData`.
        """
        self._setup, self._report, held = setup, report, setup.config.held_out
        data = _data(setup.config)
        self._data = TrainData(data, setup.model.config, setup.tokenizer, cache=cache, progress=False)
        for skipped in self._data.skipped_beforehand:
            report(skipped)
        if held.answers and jax.process_count() > 1:
            logger.warning("held_out.answers: answers are generated in runs of one process only, this one has several")
        self._loss = jax.jit(functools.partial(eval_step, setup.model, setup.config.compute.loss_chunk))
        self._batches = min(held.batches, len(self._data.plan))
        self._assistant: Assistant | None = None

    def loss(self, state: TrainState) -> dict[str, float]:
        """Figures of the first batches: mean cross-entropy of the labels in nats; records that could not be read, if any."""
        total = count = skipped = 0.0
        with self._data.batches(self._setup.rows) as batches:
            for _, batch in zip(range(self._batches), batches):
                for one in batch.skipped:
                    self._report(one)
                found = self._loss(state.trained, state.frozen, self._setup.put(batch.arrays))
                total, count, skipped = (a + float(b) for a, b in zip((total, count, skipped), found))
        figures = {"held_out_loss": total / count} if count else {}  # what was not measured has no figure
        return figures | ({"held_out_skipped": skipped} if skipped else {})

    def answers(self, state: TrainState) -> str:
        """Questions of the first records, what the model says and what is expected; why a record cannot be asked about."""
        if self._assistant is None:
            engine = Engine(self._setup.model.config, None, self._setup.mesh, dtype=self._setup.model.dtype)
            self._assistant = Assistant(tokenizer_folder(self._setup.config.start), self._setup.model.config, engine)
        engine = self._assistant.engine
        engine.params = join(state.trained, state.frozen)
        engine.images.prefixes.clear()
        records = [self._record(i) for i in range(min(self._setup.config.held_out.answers, len(self._data.sizes.record)))]
        try:
            return "\n".join(self._answer(record) for record in records)
        finally:
            engine.params = None  # the next step takes over this memory

    def _answer(self, record: Record) -> str:
        question, expected = record.messages[0].content, record.messages[1].content
        where = f"{question.strip()!r} ({', '.join(Path(m).name for m in record.media)})"
        media = record.media[: count_placeholders(record.messages[:1])]  # others belong to later turns
        template = self._data.config.template or None
        try:
            with contextlib.ExitStack() as until_asked:
                paths = [video_file(m) for m in media] if record.is_video else media
                files = [until_asked.enter_context(storage.local(path)) for path in paths]
                if not record.is_video:
                    said = self._assistant.ask(question, files, template=template, max_new_tokens=64)
                elif len(files) == 1:
                    said = self._assistant.ask(question, video=files[0], template=template, max_new_tokens=64)
                else:
                    raise UserError(f"{len(files)} videos, a question can be about one")
        except UserError as error:
            return f"{where}: not asked, {error}"
        return f"{where}: {said!r}, expected {expected!r}"

    def _record(self, number: int) -> Record:
        source, i = self._data.locate(int(self._data.sizes.record[number]))
        return source.record(i)


def _data(config: TrainConfig) -> DataConfig:
    held = config.held_out
    return dataclasses.replace(config.data, mixture=held.mixture, sources=held.sources, epochs=1)

"""Held-out records, looked at while training: their loss, and some answers in words."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax

from lmm_jax.inference.assistant import Assistant, Question, Video
from lmm_jax.inference.engine import Engine
from train.config import DataConfig, TrainConfig
from train.data import TrainData
from train.records import Record
from train.setup import Setup
from train.start import tokenizer_folder
from train.step import TrainState, eval_step, join


class HeldOut:
    """The held-out part of a run's data."""

    def __init__(self, setup: Setup, cache: Path) -> None:
        """Reads the records; their pictures are read when they are looked at."""
        self._setup, held = setup, setup.config.held_out
        data = _data(setup.config)
        self._data = TrainData(data, setup.model.config, setup.tokenizer, cache=cache, progress=False)
        self._loss = jax.jit(functools.partial(eval_step, setup.model, setup.config.compute.loss_chunk))
        self._batches = min(held.batches, len(self._data.plan))
        self._assistant: Assistant | None = None

    def loss(self, state: TrainState) -> float:
        """Mean cross-entropy of the labels in nats, over the first batches."""
        total = count = 0.0
        with self._data.batches(self._setup.rows) as batches:
            for _, batch in zip(range(self._batches), batches):
                found = self._loss(state.trained, state.frozen, self._setup.put(batch.arrays))
                total, count = total + float(found[0]), count + float(found[1])
        return total / max(count, 1.0)

    def answers(self, state: TrainState) -> str:
        """Questions of the first records, what the model says and what is expected."""
        if self._assistant is None:
            engine = Engine(self._setup.model.config, None, self._setup.mesh, dtype=self._setup.model.dtype)
            self._assistant = Assistant(tokenizer_folder(self._setup.config.start), self._setup.model.config, engine)
        engine = self._assistant.engine
        engine.params = join(state.trained, state.frozen)
        engine.images.prefixes.clear()
        records = [self._record(i) for i in range(min(self._setup.config.held_out.answers, len(self._data.sizes.record)))]
        texts = self._assistant.ask_batch(
            [_question(r) for r in records], template=self._data.config.template or None, max_new_tokens=64
        )
        engine.params = None  # the next step takes over this memory
        return "\n".join(
            f"{r.messages[0].content.strip()!r} ({', '.join(Path(m).name for m in r.media)}): {said!r}, expected "
            f"{r.messages[1].content!r}"
            for r, said in zip(records, texts)
        )

    def _record(self, number: int) -> Record:
        source, i = self._data.locate(int(self._data.sizes.record[number]))
        return source.record(i)


def _data(config: TrainConfig) -> DataConfig:
    held = config.held_out
    return dataclasses.replace(config.data, mixture=held.mixture, sources=held.sources, epochs=1)


def _question(record: Record) -> Question:
    text = record.messages[0].content
    if record.is_video:
        return Question(text, video=Video(record.media[0]))
    return Question(text, record.media)

"""Asks a model the questions of a benchmark, in batches, and keeps every answer as it comes.

    records not answered yet ─ those of this shard ─ in an order that keeps questions about one picture together
        ─► windows of a few batches, whose pictures threads read ahead ─► Assistant ─► lines of a part file

What a record is answered does not depend on the batch it is in, so batch size, shards and devices change nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lmm_jax.data.frames import video_file
from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Answered, Record
from lmm_jax.evaluation.runs import Answers
from lmm_jax.inference.assistant import Assistant, Conversation, Question

_WINDOW = 4  # batches of questions that are given to the model at a time, so that it may group those of like length


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
      batch_size: questions at once.
      max_new_tokens: limit of a reply.
      template: prompt template; None is the model's own.
      shard, shards: this process answers the records whose key leaves the rest `shard` when divided by `shards`.
      readers: threads that read pictures.
      progress: whether to show a bar.
    """

    batch_size: int = 32
    max_new_tokens: int = 128
    template: str | None = None
    shard: int = 0
    shards: int = 1
    readers: int = 4
    progress: bool = True


def missing_media(records: Sequence[Record]) -> list[str]:
    """Paths of pictures and videos that are not there, each once."""
    paths = [
        path for r in records for path in (*r.images, *([video_file(r.video)] if r.video else ())) if isinstance(path, str)
    ]
    return [path for path in dict.fromkeys(paths) if not os.path.exists(path)]


def answer(assistant: Assistant, records: Sequence[Record], answers: Answers, asking: Asking, title: str) -> int:
    """Answers what this shard has not answered yet; returns how many that were.

    Args:
      assistant: the model.
      records: all records of the benchmark.
      answers: where they are kept.
      asking: how.
      title: of the progress bar.

    Raises:
      UserError: the answers so far cannot be read, or somebody else is answering this shard.
    """
    done = answers.read()
    own = [r for r in records if r.key % asking.shards == asking.shard]
    waiting = sorted((r for r in own if r.key not in done), key=_together)
    bar = tqdm(total=len(own), initial=len(own) - len(waiting), desc=title, unit="record", disable=not asking.progress)
    with bar, answers.writer(asking.shard, asking.shards) as writer, ThreadPoolExecutor(asking.readers) as pool:
        for window, read in _ahead(assistant, _windows(waiting, asking.batch_size), pool):
            for answered in _answers(assistant, window, read, asking):
                writer.add(answered)
                bar.update()
    return len(waiting)


def _together(record: Record) -> tuple:
    """Questions without media first, then those about pictures, then videos; those about the same ones side by side."""
    kind = 2 if record.video else int(bool(record.images))
    return kind, record.video, [hash(i) if isinstance(i, bytes) else i for i in record.images][:1] or [""], record.key


def _windows(records: Sequence[Record], batch_size: int) -> Iterator[Sequence[Record]]:
    """Of videos one batch: their files are all open at once."""
    start = 0
    while start < len(records):
        stop = start + batch_size * (1 if records[start].video else _WINDOW)
        yield records[start:stop]
        start = stop


_Read = Conversation | UserError


def _ahead(
    assistant: Assistant, windows: Iterable[Sequence[Record]], pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[Record], list[_Read]]]:
    """Windows with their questions; the pictures of the next one are read meanwhile, each once."""
    before: tuple[Sequence[Record], _Pictures] | None = None
    for window in [*windows, None]:
        pictures = dict.fromkeys(picture for record in window or () for picture in record.images)
        coming = {picture: pool.submit(assistant.read_picture, picture) for picture in pictures}
        if before:
            yield before[0], [_read(assistant, record, before[1]) for record in before[0]]
        before = (window, coming) if window else None


_Pictures = dict[str | bytes, Future[np.ndarray]]


def _read(assistant: Assistant, record: Record, pictures: _Pictures) -> _Read:
    try:
        images = [pictures[picture].result() for picture in record.images]
        video = video_file(record.video) if record.video else None
        return assistant.extend(Conversation(), Question(record.text, images, video))
    except UserError as error:
        return error


def _answers(assistant: Assistant, window: Sequence[Record], read: Sequence[_Read], asking: Asking) -> Iterator[Answered]:
    """As they come; a question that cannot be asked does not keep the others from it."""
    left = {}
    for record, question in zip(window, read):
        if isinstance(question, UserError):
            yield Answered(record, "", str(question))
        else:
            left[record.key] = record, question
    try:
        for key, reply in _replies(assistant, left, asking):
            yield Answered(left.pop(key)[0], reply)
    except UserError:
        for key, (record, question) in left.items():
            try:
                ((_, reply),) = _replies(assistant, {key: (record, question)}, asking)
                yield Answered(record, reply)
            except UserError as error:
                yield Answered(record, "", str(error))


def _replies(
    assistant: Assistant, asked: Mapping[int, tuple[Record, Conversation]], asking: Asking
) -> Iterator[tuple[int, str]]:
    keys, questions = list(asked), [question for _, question in asked.values()]
    settings = {"template": asking.template, "max_new_tokens": asking.max_new_tokens, "batch_size": asking.batch_size}
    for i, answer in assistant.answers_as_completed(questions, **settings):
        yield keys[i], answer.text


def model_name(folder: Path) -> str:
    """What a model is called in answers files and tables: its folder's name, and its parent's where that says nothing."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name

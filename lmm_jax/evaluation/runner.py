"""Asks a model the questions of a benchmark, in batches, and keeps every answer as it comes.

    records not answered yet ─ those of this shard ─ in an order that keeps questions about one picture together
        ─► batches, whose pictures are read ahead by threads ─► Assistant ─► lines of a part file

What a record is answered does not depend on the batch it is in, so batch size, shards and devices change nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lmm_jax.data.frames import video_file
from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Answered, Record
from lmm_jax.evaluation.runs import Answers
from lmm_jax.inference.assistant import Assistant, Conversation, Question

_AHEAD = 2  # batches whose pictures are read while one is answered


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
    batches = [waiting[i : i + asking.batch_size] for i in range(0, len(waiting), asking.batch_size)]
    bar = tqdm(total=len(own), initial=len(own) - len(waiting), desc=title, unit="record", disable=not asking.progress)
    with bar, answers.writer(asking.shard, asking.shards) as writer, ThreadPoolExecutor(asking.readers) as pool:
        for batch, read in _ahead(assistant, batches, pool):
            writer.add(_answer(assistant, batch, read, asking))
            bar.update(len(batch))
    return len(waiting)


def _together(record: Record) -> tuple:
    """Questions without media first, then those about pictures, then videos; those about the same ones side by side."""
    kind = 2 if record.video else int(bool(record.images))
    return kind, record.video, [hash(i) if isinstance(i, bytes) else i for i in record.images][:1] or [""], record.key


_Read = Conversation | UserError


def _ahead(
    assistant: Assistant, batches: Sequence[Sequence[Record]], pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[Record], list[_Read]]]:
    """Batches with their questions, whose pictures threads have read meanwhile."""
    queue: collections.deque[tuple[Sequence[Record], list[Future[_Read]]]] = collections.deque()
    for batch in batches:
        queue.append((batch, [pool.submit(_read, assistant, record) for record in batch]))
        if len(queue) > _AHEAD:
            first, tasks = queue.popleft()
            yield first, [task.result() for task in tasks]
    for first, tasks in queue:
        yield first, [task.result() for task in tasks]


def _read(assistant: Assistant, record: Record) -> _Read:
    try:
        video = video_file(record.video) if record.video else None
        return assistant.extend(Conversation(), Question(record.text, record.images, video))
    except UserError as error:
        return error


def _answer(assistant: Assistant, batch: Sequence[Record], read: Sequence[_Read], asking: Asking) -> list[Answered]:
    """One batch; a question that cannot be asked does not keep the others from it."""
    asked = [c for c in read if isinstance(c, Conversation)]
    try:
        found = iter(_replies(assistant, asked, asking) if asked else [])
    except UserError:
        found = iter([_alone(assistant, c, asking) for c in asked])
    out = []
    for record, question in zip(batch, read):
        reply = question if isinstance(question, UserError) else next(found)
        fault = str(reply) if isinstance(reply, UserError) else ""
        out.append(Answered(record, "" if fault else str(reply), fault))
    return out


def _replies(assistant: Assistant, asked: Sequence[Conversation], asking: Asking) -> list[str]:
    answers = assistant.answers(asked, template=asking.template, max_new_tokens=asking.max_new_tokens)
    return [a.text for a in answers]


def _alone(assistant: Assistant, question: Conversation, asking: Asking) -> str | UserError:
    try:
        return _replies(assistant, [question], asking)[0]
    except UserError as error:
        return error


def model_name(folder: Path) -> str:
    """What a model is called in answers files and tables: its folder's name, and its parent's where that says nothing."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name

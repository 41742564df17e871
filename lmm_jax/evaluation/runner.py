"""Asks a model the questions of a benchmark, in batches, and keeps every answer as it comes.

    records not answered yet ─ those of this shard ─ in an order that keeps questions about one picture together
        ─► windows of a few batches, whose media threads read ahead ─► Assistant ─► lines of a part file

What a record is answered does not depend on the batch it is in, so batch size, shards and devices change nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lmm_jax.data.frames import video_file
from lmm_jax.errors import DeviceError, UserError
from lmm_jax.evaluation.benchmark import Answered, Record
from lmm_jax.evaluation.runs import Answers
from lmm_jax.inference.assistant import Assistant, Conversation, Question, Video

_WINDOW = 4  # batches of questions that are given to the model at a time, so that it may group those of like length
_FRAME_BYTES = 2**29  # host memory for the frames of a window's videos; two or three windows are there at a time


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
      batch_size: questions at once.
      max_new_tokens: limit of a reply.
      template: prompt template; None is the model's own.
      shard, shards: this process answers the records whose key leaves the rest `shard` when divided by `shards`.
      readers: threads that read pictures and videos.
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
      UserError: the answers so far cannot be read, somebody else is answering this shard, or the device failed.
    """
    own = shard_of(records, asking.shard, asking.shards)
    with answers.writer(asking.shard, asking.shards) as writer, ThreadPoolExecutor(asking.readers) as pool:
        # only now, when nobody else adds to this part; a medium that could not be read may be whole by now
        done = {key for key, (_, fault) in answers.read().items() if not fault}
        waiting = sorted((r for r in own if r.key not in done), key=_together)
        bar = tqdm(total=len(own), initial=len(own) - len(waiting), desc=title, unit="record", disable=not asking.progress)
        windows = _windows(waiting, asking.batch_size, assistant.engine.images.kept)
        with bar:
            for window, read in _ahead(assistant, windows, pool, _repeated(waiting)):
                for answered in _answers(assistant, window, read, asking):
                    writer.add(answered)
                    bar.update()
    return len(waiting)


def _together(record: Record) -> tuple:
    """Questions without media first, then those about pictures, then videos; those about the same ones side by side."""
    kind = 2 if record.video else int(bool(record.images))
    return kind, record.video, [hash(i) if isinstance(i, bytes) else i for i in record.images][:1] or [""], record.key


def shard_of(records: Sequence[Record], shard: int, shards: int) -> list[Record]:
    """One of so many parts; questions about one picture or video are in the same one."""
    numbers: dict[Any, int] = {}
    groups = (numbers.setdefault(r.video or r.images[:1] or r.key, len(numbers)) for r in records)
    return [r for r, group in zip(records, groups) if group % shards == shard]


def _windows(records: Sequence[Record], batch_size: int, kept: int) -> Iterator[Sequence[Record]]:
    """What is given to the model at a time: a few batches whose pictures it can remember, or one batch.

    Of videos it is one: their files are all open at once.
    """
    for is_video, group in itertools.groupby(records, key=lambda r: bool(r.video)):
        window: list[Record] = []
        records_of = iter(group)
        while batch := list(itertools.islice(records_of, batch_size)):
            pictures = {i for r in (*window, *batch) for i in r.images}
            if window and (is_video or len(window) >= _WINDOW * batch_size or len(pictures) > kept):
                yield window
                window = []
            window += batch
        yield window


_Read = Conversation | UserError
_Asked = Mapping[int, tuple[Record, Conversation]]  # by key
_Clip = tuple[str, int | None]  # a video, and how many of its frames are taken at most
_Media = dict[str | bytes | _Clip, Future]  # what is being read


class _Room:
    """Bytes of memory that several threads share out."""

    def __init__(self, size: int) -> None:
        self._free, self._lock = size, threading.Lock()

    def take(self, size: int) -> bool:
        """Takes so much, or nothing and returns False where less is free."""
        with self._lock:
            fits = size <= self._free
            self._free -= size * fits
            return fits


def _clip(record: Record) -> _Clip:
    return record.video, record.most_frames


def _video(record: Record) -> Video:
    return Video(video_file(record.video), most=record.most_frames)


def _repeated(records: Iterable[Record]) -> set[_Clip]:
    """Videos that several questions are about."""
    counts = collections.Counter(_clip(r) for r in records if r.video)
    return {clip for clip, count in counts.items() if count > 1}


def _ahead(
    assistant: Assistant, windows: Iterable[Sequence[Record]], pool: ThreadPoolExecutor, repeated: Set[_Clip]
) -> Iterator[tuple[Sequence[Record], list[_Read]]]:
    """Windows with their questions; pictures and repeated videos of the next one are read meanwhile, each once."""
    before: tuple[Sequence[Record], _Media] | None = None
    for window in [*windows, None]:
        coming = _coming(assistant, window or (), before[1] if before else {}, pool, repeated)
        if before:
            yield before[0], [_read(assistant, record, before[1]) for record in before[0]]
        before = (window, coming) if window else None


def _coming(
    assistant: Assistant, window: Sequence[Record], before: _Media, pool: ThreadPoolExecutor, repeated: Set[_Clip]
) -> _Media:
    """Has a window's media read; those of the window before it are there already."""
    coming: _Media = {}
    room = _Room(_FRAME_BYTES)
    for record in window:
        for picture in record.images:
            if picture not in coming:
                coming[picture] = before.get(picture) or pool.submit(assistant.read_picture, picture)
        clip = _clip(record)
        if clip in repeated and clip not in coming:
            coming[clip] = before.get(clip) or pool.submit(assistant.read_video, _video(record), room.take)
    return coming


def _read(assistant: Assistant, record: Record, media: _Media) -> _Read:
    try:
        images = [media[picture].result() for picture in record.images]
        clip = media.get(_clip(record))
        video = clip.result() if clip else _video(record) if record.video else None
        return assistant.extend(Conversation(), Question(record.text, images, video))
    except UserError as error:
        return error


def _answers(assistant: Assistant, window: Sequence[Record], read: Sequence[_Read], asking: Asking) -> Iterator[Answered]:
    """As they come; a question that cannot be asked does not keep the others from it."""
    asked = {}
    for record, question in zip(window, read):
        if isinstance(question, UserError):
            yield Answered(record, "", str(question))
        else:
            asked[record.key] = record, question
    yield from _asked(assistant, asked, asking)


def _asked(assistant: Assistant, asked: _Asked, asking: Asking) -> Iterator[Answered]:
    """A question that cannot be answered is found by halving."""
    left = dict(asked)
    try:
        for key, reply in _replies(assistant, asked, asking):
            yield Answered(left.pop(key)[0], reply)
    except DeviceError:  # not the fault of any question
        raise
    except UserError as error:
        if len(asked) == 1:
            yield Answered(*(record for record, _ in asked.values()), "", str(error))
            return
        half = -(-len(left) // 2)
        for part in (list(left)[:half], list(left)[half:]):
            yield from _asked(assistant, {key: left[key] for key in part}, asking)


def _replies(assistant: Assistant, asked: _Asked, asking: Asking) -> Iterator[tuple[int, str]]:
    keys, questions = list(asked), [question for _, question in asked.values()]
    settings = {"template": asking.template, "max_new_tokens": asking.max_new_tokens, "batch_size": asking.batch_size}
    for i, answer in assistant.answers_as_completed(questions, **settings):
        yield keys[i], answer.text


def model_name(folder: Path) -> str:
    """What a model is called in answers files and tables: its folder's name, and its parent's where that says nothing."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name

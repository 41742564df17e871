"""Writes the small visual world to disk: training data in LLaVA's form, and test questions.

A record depends on the seed and on its own number only, so a small data set is the beginning of a larger one. Pictures and
clips that are there already are kept, so an interrupted run can be continued.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lmm_jax.data.conversation import IMAGE, VIDEO
from lmm_jax.data.video import frame_indices
from lmm_jax.demo import clip_questions, questions, world
from lmm_jax.demo import clips as moving
from lmm_jax.demo.asking import Form, Question, ask_each, ask_several
from lmm_jax.demo.captions import describe, describe_clip
from lmm_jax.demo.options import SceneView
from lmm_jax.errors import UserError

VERSION = 1  # of the world: raise it when the same seed gives something else
OBJECTS = (1, world.MOST_OBJECTS)
TURNS = (1, 6)

_DESCRIBED = 0.1  # part of the conversations that begin with a description
_CHUNK = 50  # records that a process makes at a time


class _Medium(NamedTuple):
    """What pictures and clips differ in."""

    folder: str
    suffix: str
    streams: tuple[int, int]  # of random numbers, in training and in tests: a test never draws what training draws
    make: Callable[[np.random.Generator, tuple[int, int]], Any]
    most_objects: int
    view: Callable[[Any], Any]
    forms: Sequence[Form]
    describe: Callable[[Any, np.random.Generator], tuple[str, str]]
    encode: Callable[[Any], bytes]
    placeholder: str


def write_dataset(
    folder: str | os.PathLike,
    *,
    images: int,
    clips: int,
    seed: int,
    objects: tuple[int, int] = OBJECTS,
    turns: tuple[int, int] = TURNS,
    times: Mapping[str, int] | None = None,
    progress: Callable[[int], None] | None = None,
    workers: int = 1,
) -> None:
    """Writes a training set: `images/`, `clips/`, and lists of LLaVA records.

    `captions.json` and `images.json` (conversations) for pictures, `clip_captions.json` and `clips.json` for clips; a list
    is only written where it has records.

    Args:
      folder: where to; made if need be.
      images, clips: numbers of pictures and clips.
      seed: not negative.
      objects: least and greatest number of things in a picture; clips have at most `clips.MOST_OBJECTS`.
      turns: least and greatest number of questions in a conversation. A simple scene may allow fewer.
      times: how often a type of question is asked for each time that the others are; 1 where it does not tell.
      progress: is told how many more records are done.
      workers: processes; with several, a script that calls this must be guarded by `if __name__ == "__main__"`.

    Raises:
      UserError: a number out of range, an unknown type, or a folder that holds a data set made with other settings.
    """
    _check(images, clips, seed, objects, turns, workers)
    times = _checked_times(times or {})
    folder = Path(folder)
    settings = {"kind": "training", "seed": seed, "objects": list(objects), "turns": list(turns)}
    _claim(folder, settings | ({"times": times} if times else {}))
    for medium, number, names in (("image", images, ("captions", "images")), ("video", clips, ("clip_captions", "clips"))):
        make = functools.partial(_training_records, folder, medium, seed, objects, turns, times)
        records = _each(make, number, progress, workers)
        for name, column in zip(names, zip(*records)):
            lines = ",\n".join(map(json.dumps, column))
            _write(folder / f"{name}.json", f"[\n{lines}\n]\n".encode())


def write_test_set(
    folder: str | os.PathLike,
    *,
    images: int,
    clips: int,
    seed: int,
    objects: tuple[int, int] = OBJECTS,
    progress: Callable[[int], None] | None = None,
    workers: int = 1,
) -> None:
    """Writes a test set: `images/`, `clips/` and `questions.jsonl`.

    Of every picture and clip, one question of each type that it allows: "id", "image" or "video", "type", "question" and
    "answer". Arguments and errors are those of `write_dataset`; the scenes are other ones, whatever the seeds.
    """
    _check(images, clips, seed, objects, workers=workers)
    folder = Path(folder)
    _claim(folder, {"kind": "test", "seed": seed, "objects": list(objects)})
    found = []
    for medium, number in (("image", images), ("video", clips)):
        make = functools.partial(_test_records, folder, medium, seed, objects)
        found += [record for records in _each(make, number, progress, workers) for record in records]
    _write(folder / "questions.jsonl", "".join(f"{json.dumps(record)}\n" for record in found).encode())


def test_questions(
    images: int, clips: int, seed: int, objects: tuple[int, int] = OBJECTS
) -> Iterator[tuple[Image.Image | list[Image.Image], str, str, str]]:
    """The questions of `write_test_set` without files.

    Yields:
      (medium, type, question, answer): a picture, or the frames of a clip that are looked at, one a second.
    """
    _check(images, clips, seed, objects)
    for medium, number in (("image", images), ("video", clips)):
        for i in range(number):
            subject, asked = _test_subject(medium, seed, objects, i)
            shown = _draw(subject) if medium == "image" else sampled(moving.frames(subject))
            for q in asked:
                yield shown, q.type, q.text, q.answer


test_questions.__test__ = False  # no test, though its name says so


def sampled(images: Sequence[Any]) -> list[Any]:
    """The frames of a clip that are looked at, one a second (spec section 6)."""
    return [images[i] for i in frame_indices(len(images), moving.SECONDS)]


def _draw(scene: world.Scene) -> Image.Image:
    return world.draw(scene.background, scene.things)


def _png(scene: world.Scene) -> bytes:
    file = io.BytesIO()
    _draw(scene).save(file, "PNG")
    return file.getvalue()


def _mp4(clip: moving.Clip) -> bytes:
    return moving.encode(moving.frames(clip))


_MEDIA = {
    "image": _Medium(
        "images", "png", (0, 2), world.make_scene, world.MOST_OBJECTS, SceneView, questions.FORMS, describe, _png, IMAGE
    ),
    "video": _Medium(
        "clips",
        "mp4",
        (1, 3),
        moving.make_clip,
        moving.MOST_OBJECTS,
        clip_questions.ClipView,
        clip_questions.FORMS,
        describe_clip,
        _mp4,
        VIDEO,
    ),
}


def _subject(medium: str, seed: int, objects: tuple[int, int], number: int, test: bool) -> tuple[Any, np.random.Generator]:
    kind = _MEDIA[medium]
    rng = np.random.default_rng((seed, kind.streams[test], number))
    least, most = (min(n, kind.most_objects) for n in objects)
    return kind.make(rng, (least, most)), rng


def _training_records(
    folder: Path, medium: str, seed: int, objects: tuple[int, int], turns: tuple[int, int], times: dict[str, int], number: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of a description and that of a conversation; draws what they are about."""
    kind = _MEDIA[medium]
    subject, rng = _subject(medium, seed, objects, number, test=False)
    caption = kind.describe(subject, rng)
    asked = ask_several(kind.view(subject), kind.forms, int(rng.integers(turns[0], turns[1] + 1)), rng, times)
    talk = [(q.text, q.answer) for q in asked]
    if rng.random() < _DESCRIBED or not talk:  # of a rare clip nothing can be asked
        talk.insert(0, kind.describe(subject, rng))
    file = _store(folder, kind, number, subject)
    return tuple(
        {"id": f"{prefix}-{number:06d}", medium: file, "conversations": _conversation(kind.placeholder, pairs)}
        for prefix, pairs in ((f"{medium}-caption", [caption]), (medium, talk))
    )


def _conversation(placeholder: str, pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]
    turns[0]["value"] = f"{placeholder}\n{turns[0]['value']}"
    return turns


def _test_subject(medium: str, seed: int, objects: tuple[int, int], number: int) -> tuple[Any, list[Question]]:
    kind = _MEDIA[medium]
    subject, rng = _subject(medium, seed, objects, number, test=True)
    return subject, ask_each(kind.view(subject), kind.forms, rng)


def _test_records(folder: Path, medium: str, seed: int, objects: tuple[int, int], number: int) -> list[dict[str, str]]:
    subject, asked = _test_subject(medium, seed, objects, number)
    file = _store(folder, _MEDIA[medium], number, subject)
    return [
        {"id": f"{medium}-{number:06d}-{q.type}", medium: file, "type": q.type, "question": q.text, "answer": q.answer}
        for q in asked
    ]


def _store(folder: Path, kind: _Medium, number: int, subject: Any) -> str:
    """Draws a picture or clip if its file is not there; returns the file's name in the data set."""
    file = f"{kind.folder}/{number:06d}.{kind.suffix}"
    if not (folder / file).exists():
        _write(folder / file, kind.encode(subject))
    return file


def _write(file: Path, content: bytes) -> None:
    """Writes a file so that it is either whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")  # a name that no other process takes
    part.write_bytes(content)
    part.replace(file)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Notes what a folder's files are made with, so that they are never mixed with others."""
    note, settings = folder / "dataset.json", {"version": VERSION, **settings}
    try:
        if note.exists() and (made := json.loads(note.read_text("utf-8"))) != settings:
            raise UserError(f"{folder} holds a data set made with {made}, not {settings}: choose another folder")
        _write(note, json.dumps(settings).encode())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"a data set cannot be written to {folder} ({error}): choose another folder") from error


def _check(
    images: int, clips: int, seed: int, objects: tuple[int, int], turns: tuple[int, int] = TURNS, workers: int = 1
) -> None:
    for name, value, least in (("images", images, 0), ("clips", clips, 0), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise UserError(f"{name} is {value}: expected a number of at least {least}")
    if images + clips == 0:
        raise UserError("no images and no clips are asked for: expected at least one of them")
    for name, (least, most), limit in (("objects", objects, world.MOST_OBJECTS), ("turns", turns, 20)):
        if not 1 <= least <= most <= limit:
            raise UserError(f"{name} is {least} to {most}: expected a range within 1 to {limit}")


def _checked_times(times: Mapping[str, int]) -> dict[str, int]:
    types = sorted({form.type for medium in _MEDIA.values() for form in medium.forms})
    for name, number in times.items():
        if name not in types or number < 1:
            raise UserError(f"{name}={number}: expected one of {', '.join(types)}, and a number of at least 1")
    return dict(times)


def _each(make: Callable[[int], Any], number: int, progress: Callable[[int], None] | None, workers: int) -> list[Any]:
    """make(0), make(1), ... in order."""
    done, tell = [], progress or (lambda _: None)
    if workers == 1 or number <= _CHUNK:
        for i in range(number):
            done.append(make(i))
            tell(1)
        return done
    context = multiprocessing.get_context("spawn")  # forked processes may hang where JAX or a video decoder runs threads
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            for record in pool.map(make, range(number), chunksize=_CHUNK):
                done.append(record)
                tell(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done

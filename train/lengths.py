"""How long every record is, in tokens: computed once and kept in a file.

What is kept does not depend on the model's sizes, so that other compressions, lengths and batches need no new count. The
name of the file is a hash of all that decides about tokens: the tokenizer's files, the template, the records, and the tokens
of a probe, which change when this program's own templates do.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lmm_jax.config import IGNORE_LABEL, IMAGE_TOKEN_ID
from lmm_jax.data.conversation import render
from lmm_jax.data.tokenize import Tokenizer
from lmm_jax.errors import UserError
from train.records import Record, Source, UnusableError, parse

_MANY = 20_000  # records from which on starting further processes pays
_CHUNK = 512  # records that a process takes at a time
_COLUMNS = ("tokens", "media", "is_video", "fused", "labelled", "largest")
_VERSION = 1  # raise it when other records than before can be used
_PROBE = """{"image": "a", "conversations": [{"from": "human", "value": "<image>\\nWhat is it? "},
            {"from": "gpt", "value": " It's red, é."}]}""".encode()
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template")


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of the N chosen records of a source, int32 (N,) each; all 0 where a record is unusable.

    Attributes:
      tokens: of the whole conversation, a placeholder counting as one.
      media: pictures or videos.
      is_video: 1 where they are videos.
      fused: tokens that pre-fusion sees where there is a medium and pre-fusion.
      labelled: tokens that are predicted.
      largest: greatest token id.
      faults: the unusable ones: index among the chosen records, reason, detail.
    """

    tokens: np.ndarray
    media: np.ndarray
    is_video: np.ndarray
    fused: np.ndarray
    labelled: np.ndarray
    largest: np.ndarray
    faults: list[tuple[int, str, str]]


def encode(record: Record, template: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, int32 (t,), and labels, int32 (t,), of a record (spec section 8).

    Raises:
      UnusableError: the record does not fit the template, or nothing in it is an answer.
    """
    try:
        ids, labels = tokenizer.encode(render(record.messages, template, tokenizer, generate=False))
    except UserError as error:
        raise UnusableError("does not fit the template", str(error)) from error
    if not np.any(labels[1:] != IGNORE_LABEL):
        raise UnusableError("no answer to learn from")
    if (ids == IMAGE_TOKEN_ID).sum() != len(record.media):
        raise UnusableError("placeholders and media differ in number", "in the rendered conversation")
    return ids, labels


def measure(source: Source, template: str, tokenizer: Tokenizer, cache: Path, *, progress: bool = True) -> Lengths:
    """Lengths of a source's records, from the cache where they are there; else computed and put there.

    Several processes may do this at once: they write the same bytes, each into a file of its own that then takes its place.

    Args:
      source: the records.
      template: one of `lmm_jax.config.TEMPLATES`.
      tokenizer: the model's.
      cache: folder; it is made.
      progress: whether to show a bar.
    """
    file = cache / f"lengths-{_key(source, template, tokenizer)}.npz"
    lengths = _read(file, source)
    if lengths is None:
        lengths = _compute(source, template, tokenizer, progress)
        _write(file, lengths)
    return lengths


def _compute(source: Source, template: str, tokenizer: Tokenizer, progress: bool) -> Lengths:
    table = np.zeros((len(source), len(_COLUMNS)), np.int32)
    faults = []
    bar = tqdm(total=len(source), desc=f"counting tokens of {Path(source.config.file).name}", unit="", disable=not progress)
    with bar:
        for i, row in enumerate(_rows(source, template, tokenizer)):
            if isinstance(row, UnusableError):
                faults.append((i, row.reason, row.detail))
            else:
                table[i] = row
            bar.update()
    return Lengths(*table.T, faults)


_Row = tuple[int, ...] | UnusableError


def _rows(source: Source, template: str, tokenizer: Tokenizer) -> Iterator[_Row]:
    """A row of the table for each record, in order; with many records by several processes."""
    raws = (source.raw(i) for i in range(len(source)))
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)
    workers = min(workers, len(source) // _MANY + 1)
    if workers == 1:
        yield from (_row(raw, template, tokenizer) for raw in raws)
        return
    chunks = iter(lambda: list(itertools.islice(raws, _CHUNK)), [])
    spawn = multiprocessing.get_context("spawn")  # this process has threads, whose locks a fork would copy
    pending = collections.deque()
    with ProcessPoolExecutor(workers, spawn, _start, (str(tokenizer.folder), template)) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            for task in pending:
                yield from task.result()
        except BrokenProcessPool as error:
            raise UserError(f"a process that counts tokens ended: is there memory for {workers} of them?") from error


_worker: tuple[str, Tokenizer]  # of a worker process


def _start(folder: str, template: str) -> None:
    global _worker
    _worker = template, Tokenizer.load(folder)


def _work(raws: list[bytes]) -> list[_Row]:
    return [_row(raw, *_worker) for raw in raws]


def _row(raw: bytes, template: str, tokenizer: Tokenizer) -> _Row:
    try:
        record = parse(raw, "")
        ids, labels = encode(record, template, tokenizer)
    except UnusableError as error:
        return error
    answer = labels != IGNORE_LABEL
    fused = int(((ids > 0) & ~answer).sum())
    return len(ids), len(record.media), int(record.is_video), fused, int(answer[1:].sum()), int(ids.max())


def _key(source: Source, template: str, tokenizer: Tokenizer) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(tokenizer.folder).iterdir()):
        if file.is_file() and file.name.startswith(_TOKENIZER_FILES):
            digest.update(f"{file.name} {hashlib.blake2b(file.read_bytes()).hexdigest()}".encode())
    try:
        ids, labels = encode(parse(_PROBE, ""), template, tokenizer)
    except UnusableError as error:  # no record will fit this template either
        raise UserError(error.detail or error.reason) from error
    digest.update(f"{_VERSION} {template} {source.fingerprint} {ids.tolist()} {labels.tolist()}".encode())
    digest.update(source.numbers.astype("<i8").tobytes())
    return digest.hexdigest()


def _write(file: Path, lengths: Lengths) -> None:
    faults = np.frombuffer(json.dumps(lengths.faults).encode(), np.uint8)
    arrays = {name: getattr(lengths, name) for name in _COLUMNS} | {"faults": faults}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as part:
            np.savez_compressed(part, **arrays)
        os.replace(part.name, file)
    except OSError as error:
        raise UserError(f"the lengths of records cannot be kept in {file.parent} ({error}): set data.cache") from error


def _read(file: Path, source: Source) -> Lengths | None:
    """What was kept; None where there is nothing, or nothing whole."""
    try:
        with np.load(file) as arrays:
            columns = [arrays[name] for name in _COLUMNS]
            faults = [(int(i), str(reason), str(detail)) for i, reason, detail in json.loads(arrays["faults"].tobytes())]
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile):
        return None
    return Lengths(*columns, faults) if all(c.shape == (len(source),) for c in columns) else None

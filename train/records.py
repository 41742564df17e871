"""Files of conversations -> records, one at a time (spec sections 8 and 10).

A file is read once and kept as text; a record is parsed when it is looked at. 665,000 records so take the memory of their
file and not that of Python objects. Layouts: LLaVA's, as a JSON list or one record per line,

    {"id": ..., "image": path or list of paths | "video": path, "conversations": [{"from": "human" | "gpt", "value": ...}]}

and Video-ChatGPT's, ``{"q": question, "a": answer, "video_id": name}``.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lmm_jax import storage
from lmm_jax.data.conversation import VIDEO, Message, count_placeholders, from_llava
from lmm_jax.errors import UserError
from train.config import DataConfig, SourceConfig

LINES = (".jsonl", ".ndjson")

_SPACE = re.compile(r"[ \t\r\n]*")
_SAMPLING = re.compile(r"(first|end|random):(\d+|\d+(?:\.\d+)?%)")


class UnusableError(Exception):
    """A record that cannot be trained on: a reason to count it by, and what exactly is wrong with this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """See the class."""
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that was not trained on.

    Attributes:
      file: the source.
      record: its number in the file, from 0.
      id: what the file calls it; "" where it has no name.
      media: its pictures and videos.
      reason: one of few, to count by.
      detail: what exactly is wrong; may be empty.
    """

    file: str
    record: int
    id: str
    media: tuple[str, ...]
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation, checked: turns alternate from a user's on and end with an answer; one medium per placeholder.

    Attributes:
      id: what the file calls it.
      media: paths of its pictures or videos, not known to exist.
      is_video: whether the media are videos.
      messages: the turns.
    """

    id: str
    media: tuple[str, ...]
    is_video: bool
    messages: list[Message]


class Source:
    """The chosen records of one file.

    Attributes:
      config: where it lies, with paths that need no further folder.
      numbers: int64 (N,), ascending: which records of the file were chosen.
      total: records in the file.
      fingerprint: of the content of the file.
    """

    def __init__(self, config: SourceConfig, text: _Text, numbers: np.ndarray) -> None:
        """Made by `load_sources`."""
        self.config = config
        self.numbers = numbers
        self.total = len(text)
        self.fingerprint = text.fingerprint
        self._text = text

    def __len__(self) -> int:
        """How many records were chosen (N)."""
        return len(self.numbers)

    def raw(self, i: int) -> bytes:
        """The JSON of the i-th chosen record."""
        return self._text[int(self.numbers[i])]

    def record(self, i: int) -> Record:
        """The i-th chosen record.

        Raises:
          UnusableError: it cannot be trained on.
        """
        return parse(self.raw(i), self.config.media)

    def skipped(self, i: int, error: UnusableError) -> Skipped:
        """How the i-th chosen record is reported."""
        name, media = identify(self.raw(i), self.config.media)
        return Skipped(self.config.file, int(self.numbers[i]), name, media, error.reason, error.detail)


def load_sources(config: DataConfig) -> list[Source]:
    """Reads the mixture's files and chooses from them as their `sampling` says; the random choice depends on the seed.

    Raises:
      UserError: no source; a file that is missing, not JSON or not a list of records; a sampling that cannot be understood.
    """
    configs = [_at("", source) for source in config.sources]
    if config.mixture:
        configs = read_mixture(config.mixture) + configs
    if not configs:
        raise UserError("there is no training data: name a YAML file in data.mixture, or files in data.sources")
    read = functools.cache(_Text.read)  # a file that is named twice is read once
    sources = []
    for number, source in enumerate(configs):
        text = read(source.file)
        rng = np.random.default_rng((config.seed, number))
        sources.append(Source(source, text, choose(source.sampling, len(text), rng)))
    return sources


def read_mixture(file: str | os.PathLike) -> list[SourceConfig]:
    """A YAML list of sources, ``- {file: ..., media: ..., sampling: ...}``; paths in it are relative to its folder.

    Raises:
      UserError: it is missing, no YAML, or no list of such entries.
    """
    import yaml

    try:
        with storage.reaching(file):
            entries = yaml.safe_load(storage.as_path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the mixture {file} cannot be read ({error}): give a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"the mixture {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"the mixture {file} holds {entries!r:.80}: expected a list of sources, each with a file")
    known = {field.name for field in dataclasses.fields(SourceConfig)}
    for number, entry in enumerate(entries, 1):
        fields = entry if isinstance(entry, dict) else {}
        if "file" not in fields or set(fields) - known or not all(isinstance(v, str) for v in fields.values()):
            raise UserError(
                f"source {number} of the mixture {file} is {entry!r:.200}: expected a file, and if needed media and sampling"
            )
    return [_at(os.path.dirname(file), SourceConfig(**entry)) for entry in entries]


def _at(folder: str, source: SourceConfig) -> SourceConfig:
    file = storage.join(folder, source.file)
    media = storage.join(folder, source.media) if source.media else os.path.dirname(file)
    storage.as_path(media)  # complains where buckets cannot be reached
    return dataclasses.replace(source, file=file, media=media)


def choose(sampling: str, total: int, rng: np.random.Generator) -> np.ndarray:
    """Which of `total` records are taken, ascending.

    Args:
      sampling: all, or first, end or random, a colon, and a number of records or a percentage of them (rounded up). More
        than there are is all.
      total: records in the file.
      rng: of the random choice.

    Returns:
      int64 (N,).

    Raises:
      UserError: `sampling` is none of these.
    """
    if sampling == "all":
        return np.arange(total)
    match = _SAMPLING.fullmatch(sampling)
    if not match:
        raise UserError(f"the sampling {sampling!r} is not understood: write all, first:1000, end:10% or random:999")
    kind, amount = match.groups()
    share = amount.endswith("%")
    wanted = int(np.ceil(round(total * float(amount[:-1]) / 100, 6))) if share else int(amount)
    wanted = min(wanted, total)
    if kind == "random":
        return np.sort(rng.permutation(total)[:wanted])
    return np.arange(total)[:wanted] if kind == "first" else np.arange(total)[total - wanted :]


class _Text(Sequence[bytes]):
    """A file of records as it was read, and where each record lies in it.

    The text is decoded as Latin-1, so that a character is a byte: JSON's own marks are the same in it as in UTF-8.
    """

    def __init__(self, text: str, spans: Iterator[tuple[int, int]], fingerprint: str) -> None:
        self._text = text
        self._spans = np.array(array.array("q", (at for span in spans for at in span))).reshape(-1, 2)
        self.fingerprint = fingerprint

    @classmethod
    def read(cls, file: str) -> _Text:
        try:
            with storage.reaching(file):
                data = storage.as_path(file).read_bytes()
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error.strerror or error}): give a JSON or JSONL file of conversations"
            ) from error
        fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
        text = data.decode("latin-1").removeprefix("\xef\xbb\xbf")  # the mark that some editors put before UTF-8
        spans = _lines if file.endswith(LINES) else _list
        try:
            return cls(text, spans(text, json.JSONDecoder().raw_decode), fingerprint)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise UserError(f"{file} is not a list of JSON records: {error.msg} at {place}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
            raise UserError(f"{file} is not a list of JSON records: {error}") from error

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> bytes:
        start, stop = self._spans[number]
        return self._text[start:stop].encode("latin-1")


_Decode = Callable[[str, int], tuple[Any, int]]


def _list(text: str, decode: _Decode) -> Iterator[tuple[int, int]]:
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise json.JSONDecodeError("expected '[' (a file with one record per line is named .jsonl)", text, at)
    at = _after_space(text, at + 1)
    while text[at : at + 1] != "]":
        _, stop = decode(text, at)
        yield at, stop
        at = _after_space(text, stop)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']'", text, at)
    _expect_end(text, at + 1)


def _lines(text: str, decode: _Decode) -> Iterator[tuple[int, int]]:
    end = -1
    while end < len(text):
        start, end = end + 1, text.find("\n", end + 1) % (len(text) + 1)  # -1, no further line, becomes the length
        line = text[start:end].strip()
        if line:
            at = text.index(line[0], start)
            try:
                _, length = decode(line, 0)
                _expect_end(line, length)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, text, at + error.pos) from None
            yield at, at + length


def _expect_end(text: str, at: int) -> None:
    at = _after_space(text, at)
    if at < len(text):
        raise json.JSONDecodeError("something follows the end", text, at)


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def parse(raw: bytes, folder: str) -> Record:
    """One record from its JSON; media are paths below `folder`.

    Raises:
      UnusableError: it cannot be trained on.
    """
    fields = _fields(raw)
    media, is_video = _media(fields, folder)
    messages = _messages(fields)
    if messages[-1].role == "user":
        raise UnusableError("the last turn has no answer")
    found = count_placeholders(messages)
    if found and not media:
        raise UnusableError("placeholder without a medium", f"{found} placeholder(s)")
    if media and not found:
        raise UnusableError("medium without a placeholder", f"{len(media)} picture(s) or video(s)")
    if found != len(media):
        raise UnusableError("placeholders and media differ in number", f"{found} placeholder(s), {len(media)} medium(s)")
    return Record(_name(fields), media, is_video, messages)


def identify(raw: bytes, folder: str) -> tuple[str, tuple[str, ...]]:
    """What a record is called, and its media as far as they can be told; for records that `parse` refuses, too."""
    try:
        fields = _fields(raw)
    except UnusableError:
        return "", ()
    try:
        return _name(fields), _media(fields, folder)[0]
    except UnusableError:
        return _name(fields), ()


def _fields(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except ValueError as error:  # its bytes are no UTF-8: its marks are, or it would not have been found
        raise UnusableError("malformed record", f"not UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise UnusableError("malformed record", f"expected an object, got {fields!r:.80}")
    return fields


def _name(fields: dict[str, Any]) -> str:
    return str(fields.get("id", fields.get("video_id", "")))


def _media(fields: dict[str, Any], folder: str) -> tuple[tuple[str, ...], bool]:
    """Paths and whether they are videos. A key that holds null is no medium."""
    given = {key: fields[key] for key in ("image", "video", "video_id") if fields.get(key) is not None}
    if "q" not in fields:
        given.pop("video_id", None)
    if len(given) > 1:
        raise UnusableError("both pictures and video")
    for key, value in given.items():
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise UnusableError("malformed record", f"{key} is {value!r:.80}: expected a path")
        return tuple(storage.join(folder, name) for name in names), key != "image"
    return (), False


def _messages(fields: dict[str, Any]) -> list[Message]:
    turns = fields.get("conversations")
    if "q" in fields and "conversations" not in fields:  # Video-ChatGPT's
        if not isinstance(fields["q"], str) or not fields["q"].strip():
            raise UnusableError("malformed record", f"q is {fields['q']!r:.80}: expected a question")
        turns = [{"from": "human", "value": f"{VIDEO}\n{fields['q']}"}, {"from": "gpt", "value": fields.get("a")}]
    if not isinstance(turns, list):
        raise UnusableError("malformed record", f"conversations are {turns!r:.80}: expected a list of turns")
    if not turns:
        raise UnusableError("empty conversation")
    try:
        messages = from_llava(turns)
    except UserError as error:
        raise UnusableError("malformed turns", str(error)) from error
    roles = [message.role for message in messages]
    if any(a == b for a, b in zip(roles, roles[1:])):
        raise UnusableError("turns do not alternate", " ".join(roles)[:200])
    return messages

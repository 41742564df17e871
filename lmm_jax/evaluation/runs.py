"""A run folder: what was asked, of which model, and every answer so far.

RUN/settings.json                    model, template, number format: an answer given otherwise is never mixed in
RUN/sessions.jsonl                   a line for each process that answered: when, on which devices, with which versions
RUN/BENCHMARK/part.1of4.jsonl        answers of one shard in the order they came: key, reply, fault
RUN/BENCHMARK/answers.jsonl          all of them in the benchmark's published form, once there are all
RUN/BENCHMARK/scores.json            figures and counts
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import hashlib
import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmm_jax.errors import UserError
from lmm_jax.evaluation.benchmark import Answered, Benchmark, Record, Row, read_json, read_lines

MISSING = "missing"
SETTINGS = "settings.json"
SESSIONS = "sessions.jsonl"


class Answers:
    """The answers of a benchmark in a run folder; several processes may add to it, each to a file of its own."""

    def __init__(self, run: Path, benchmark: Benchmark) -> None:
        """Nothing is read yet."""
        self.folder = run / (benchmark.answers or benchmark.name)
        self._benchmark = benchmark

    def read(self) -> dict[int, tuple[str, str]]:
        """Key -> (reply, fault) of all parts, of several the one without a fault.

        A line that a killed process left half written is not there.

        Raises:
          UserError: a part that is no part.
        """
        found: dict[int, tuple[str, str]] = {}
        for file in sorted(self.folder.glob("part.*.jsonl")):
            whole = file.read_bytes()
            for number, line in enumerate(whole[: whole.rfind(b"\n") + 1].splitlines(), 1):
                try:
                    row = json.loads(line)
                    key, reply, fault = int(row["key"]), str(row["reply"]), str(row["fault"])
                    if key not in found or found[key][1]:
                        found[key] = reply, fault
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"line {number} of {file} is not an answer: remove the line, or the file") from error
        return found

    def writer(self, shard: int, shards: int) -> PartWriter:
        """Adds to the part of one shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return PartWriter(self.folder / f"part.{shard + 1}of{shards}.jsonl")

    def merge(self, records: Sequence[Record], model: str) -> Path | None:
        """Writes `answers.jsonl` once every record has been answered, and returns it; None while some have not."""
        found = self.read()
        if any(record.key not in found for record in records):
            return None
        lines = []
        for record in records:
            reply, fault = found[record.key]
            ids = {"key": record.key, "answer_id": _answer_id(self.folder.name, record.key), "model_id": model}
            row = self._benchmark.answer_row(record, reply) | ids
            lines.append(json.dumps(row | ({"fault": fault} if fault else {}), ensure_ascii=False) + "\n")
        return write_whole(self.folder / "answers.jsonl", "".join(lines))


def _answer_id(benchmark: str, key: int) -> str:
    """As long as the published ones, which are random (evaluation spec section 1.6); this one is always the same."""
    return hashlib.blake2b(f"{benchmark} {key}".encode(), digest_size=11).hexdigest()


class PartWriter:
    """Appends answers; every line is on its way to the disk when `add` returns."""

    def __init__(self, file: Path) -> None:
        """Removes a line that a killed process left half written.

        Raises:
          UserError: another process is adding to the file.
        """
        self._file = file.open("a", encoding="utf-8", errors="backslashreplace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is adding to {file}: wait for it, or stop it") from error
        except OSError:
            pass  # a file system without locks
        self._file.truncate(file.read_bytes().rfind(b"\n") + 1)

    def add(self, answer: Answered) -> None:
        """One answer."""
        line = {"key": answer.record.key, "reply": answer.reply, "fault": answer.fault}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends it."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> PartWriter:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


def settle(folder: Path, settings: dict[str, Any], *, fresh: bool = False) -> None:
    """Writes down how questions are put, or checks that they are still put so; several processes may do so at once.

    Args:
      folder: made if need be.
      settings: what must stay; versions of libraries, and where the model lies, may change.
      fresh: whether the folder must be new, or empty, where there are no settings in it.

    Raises:
      UserError: they were put otherwise, or the folder is something else.
    """
    file = folder / SETTINGS
    if fresh and not file.exists() and _occupied(folder) and not file.exists():  # which another process may have just made
        raise UserError(f"{folder} is no empty folder and holds no {SETTINGS} of a run: choose another folder")
    _make(folder)
    if file.exists() or not _create(file, json.dumps(settings, indent=2) + "\n"):
        before = settings_of(folder)
        names = sorted((set(before) | set(settings)) - {"versions", "folder"})
        changed = [f"{n} was {before.get(n)!r} and is {settings.get(n)!r}" for n in names if before.get(n) != settings.get(n)]
        if changed:
            raise UserError(f"{folder} was begun otherwise ({'; '.join(changed)}): give it the same, or choose another folder")


def _occupied(folder: Path) -> bool:
    if not folder.exists():
        return False
    return not folder.is_dir() or any(not (f.name.startswith(".") and f.name.endswith(".part")) for f in folder.iterdir())


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error}") from error


def questions_digest(records: Sequence[Record]) -> str:
    """Of what is asked: an answer belongs to a record by its number, so the records must stay the same."""
    digest = hashlib.blake2b(digest_size=8)
    for r in records:
        media = [Path(i).name if isinstance(i, str) else hashlib.blake2b(i).hexdigest() for i in (*r.images, r.video)]
        digest.update(json.dumps([r.key, r.text, media, r.row], sort_keys=True).encode())
    return digest.hexdigest()


def check_questions(folder: Path, records: Sequence[Record]) -> None:
    """Raises UserError where the answers in a benchmark's folder were given to other questions."""
    asked = settings_of(folder).get("questions")
    if asked and asked != questions_digest(records):
        raise UserError(
            f"the answers in {folder} were given to other questions than those that are there now ({len(records)} records): "
            "put the benchmark's files back, or answer into another folder"
        )


def add_session(folder: Path, session: Mapping[str, Any]) -> None:
    """Writes down that a process is about to answer, and with what; several may do so at once.

    Raises:
      UserError: it cannot be written.
    """
    file = folder / SESSIONS
    try:
        with file.open("ab", buffering=0) as lines:
            lines.write(json.dumps(session).encode() + b"\n")  # in one piece
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from error


def settings_of(folder: Path) -> dict[str, Any]:
    """What `settle` wrote; nothing where it never did.

    Raises:
      UserError: the file is damaged.
    """
    file = folder / SETTINGS
    found = read_json(file) if file.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{file} does not hold settings: remove the folder, or choose another one")
    return found


def gather(records: Sequence[Record], found: dict[int, tuple[str, str]]) -> list[Answered]:
    """Each record with its answer, or marked as missing."""
    return [Answered(record, *found.get(record.key, ("", MISSING))) for record in records]


def from_file(benchmark: Benchmark, records: Sequence[Record], file: Path, broken: list[int] | None = None) -> list[Answered]:
    """Answers from a file in the benchmark's published form, made by whomever, in any order. Replies are taken as they are.

    Args:
      benchmark: tells which line belongs to which record.
      records: all of them.
      file: JSON lines.
      broken: see `benchmark.read_lines`.

    Raises:
      UserError: a line that belongs to no record, or to one that has an answer already; one that holds no reply.
    """
    found: dict[int, tuple[str, str]] = {}
    waiting = collections.defaultdict(collections.deque)
    for record in records:
        waiting[benchmark.identity_of(record)].append(record.key)  # of several that nothing tells apart the first comes first
    rows = (row for line in read_lines(file, broken) for row in benchmark.rows_of(line))
    for number, row in enumerate(rows, 1):
        try:
            key = waiting[benchmark.identity(row)].popleft()
        except (IndexError, TypeError) as error:  # none is left, or the row has a list for an id
            message = f"answer {number} in {file} is to no record of {benchmark.title}, or to one that has an answer"
            raise UserError(message) from error
        found[key] = _reply(benchmark, row, number, file), str(row.get("fault", ""))
    return gather(records, found)


def _reply(benchmark: Benchmark, row: Row, number: int, file: Path) -> str:
    try:
        reply = benchmark.reply_of(row)
    except (KeyError, TypeError) as error:
        raise UserError(f"answer {number} in {file} holds no reply: {error} is missing") from error
    if not isinstance(reply, str):
        raise UserError(f"answer {number} in {file} holds {reply!r:.40} in place of a reply")
    return reply


def counts(answers: Sequence[Answered]) -> dict[str, int]:
    """How many records there are, and how many of them have no answer or none that counts."""
    faults = [a.fault for a in answers if a.fault]
    return {"records": len(answers), "missing": faults.count(MISSING), "faults": len(faults) - faults.count(MISSING)}


def counted(counts: Mapping[str, int]) -> str:
    """What `counts` gives as text: "5000 records, 3 missing, 2 with a fault"."""
    named = {"records": "records", "missing": "missing", "faults": "with a fault"}
    return ", ".join(f"{counts[name]} {text}" for name, text in named.items() if counts[name] or name == "records")


def off_size(records: int, size: int | None) -> str:
    """A sentence where the records are fewer or more than those that were published; "" where that is not known."""
    return "" if size in (None, records) else f"{records} records, the published data has {size}"


def write_whole(file: Path, text: str) -> Path:
    """A file that is there whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    try:
        os.replace(_part(file, text), file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from error
    return file


def _create(file: Path, text: str) -> bool:
    """As `write_whole`, but leaves a file alone that is there already; whether it was not."""
    part = None
    try:
        part = _part(file, text)
        os.link(part, file)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if part is None:
            raise UserError(f"{file} cannot be written: {error}") from error
        os.replace(part, file)  # a file system without links
        return True
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _part(file: Path, text: str) -> Path:
    """A file beside another one, under a name that nobody else takes."""
    part = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.part")
    part.write_text(text, "utf-8", errors="backslashreplace")
    return part


def as_json(score: Any) -> dict[str, Any]:
    """A score for a file; not what each single record got."""
    values = dataclasses.asdict(score)
    del values["right"], values["expected"]
    return values

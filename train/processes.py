"""What several processes of one run settle among themselves before they start."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmm_jax.errors import UserError

T = TypeVar("T")


def read_alike(read: Callable[[], T], fingerprint: Callable[[T], str]) -> T:
    """Calls `read` in every process, in the first one before the others, which then find what it kept.

    Args:
      read: is called once.
      fingerprint: 16 bytes, in hexadecimal digits, of what was read.

    Raises:
      UserError: what `read` raised, or that another process failed or read something else. All processes raise.
    """
    if jax.process_count() == 1:
        return read()
    found, error = None, None
    for turn in (True, False):
        if (jax.process_index() == 0) == turn:
            try:
                found = read()
            except UserError as caught:
                error = caught
        multihost_utils.sync_global_devices(f"read {turn}")
    mine = bytes(16) if error else bytes.fromhex(fingerprint(found))
    every = multihost_utils.process_allgather(np.frombuffer(mine, np.uint8))
    if error:
        raise error
    failed = [i for i, other in enumerate(every) if not other.any()]
    if failed:
        raise UserError(f"processes {failed} could not read what they need: each says why")
    differ = [i for i, other in enumerate(every) if (other != every[0]).any()]
    if differ:
        raise UserError(f"processes {differ} have other training data, or another tokenizer, than process 0: copy them again")
    return found


def of_first(value: bool) -> bool:
    """What the first process says, in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value))) if jax.process_count() > 1 else value


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder, so that it is not trained in twice at once. The lock ends with the process.

    Raises:
      UserError: somebody else holds it.
    """
    if jax.process_index():
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training in {folder}: stop it first, or choose another folder") from error
        except OSError:
            pass  # a file system without locks
        yield

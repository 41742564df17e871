"""Paths of this machine and of buckets: ``gs://bucket/folder`` goes wherever a model, a run or its data are named.

Buckets are reached by epath and gcsfs (``pip install 'lmm-jax[gcs]'``), arrays in them by TensorStore, with the credentials
that the environment holds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmm_jax.errors import UserError

GS = "gs://"


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it lies in a bucket."""
    return os.fspath(path).startswith(GS)


def as_path(path: str | os.PathLike) -> Path:
    """A path to read and write by; one in a bucket has pathlib's methods, too.

    Raises:
      UserError: what it takes to reach a bucket is not installed.
    """
    if not is_remote(path):
        return Path(path)
    try:
        import gcsfs  # noqa: F401  epath says less clearly that it is missing
        from etils import epath
    except ImportError as error:
        raise UserError(f"{os.fspath(path)} is in a bucket, which takes pip install 'lmm-jax[gcs]'") from error
    return epath.Path(path)


def absolute(path: str | os.PathLike) -> Path:
    """The same with nothing relative in it."""
    found = as_path(path)
    return found if is_remote(path) else found.resolve()


def join(folder: str | os.PathLike, name: str) -> str:
    """A name as seen from a folder; either may be in a bucket."""
    return name if is_remote(name) else os.path.join(os.fspath(folder), name)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a folder."""
    return as_path(path).exists()


@contextlib.contextmanager
def local(path: str | os.PathLike) -> Iterator[str]:
    """A file of this machine with the content of `path`: itself, or a copy that is gone afterwards.

    Raises:
      OSError: the bucket cannot be read.
    """
    if not is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.NamedTemporaryFile(suffix=os.path.splitext(os.fspath(path))[1]) as file:
        with reaching(path):
            file.write(as_path(path).read_bytes())
        file.flush()
        yield file.name


def local_folder(folder: str | os.PathLike, names: Iterable[str]) -> Path:
    """A folder of this machine with those of the named files that `folder` has: itself, or copies that last as we do.

    Raises:
      OSError: the bucket cannot be read.
    """
    return _copied(os.fspath(folder), tuple(names)) if is_remote(folder) else Path(folder)


@functools.cache
def _copied(folder: str, names: tuple[str, ...]) -> Path:
    here = Path(tempfile.mkdtemp(prefix="lmm-jax-"))
    atexit.register(shutil.rmtree, here, ignore_errors=True)
    with reaching(folder):
        for name in names:
            if (file := as_path(folder) / name).exists():
                (here / name).write_bytes(file.read_bytes())
    return here


@contextlib.contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
    """What goes wrong on the way to a bucket, credentials and network among it, as an OSError."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:  # of gcsfs, aiohttp and google.auth, which have no class in common
        if not is_remote(path):
            raise
        raise OSError(f"{os.fspath(path)}: {str(error) or type(error).__name__}") from error

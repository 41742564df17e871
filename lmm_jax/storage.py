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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmm_jax.errors import UserError

GS = "gs://"
_CARRIERS = ("gcsfs", "fsspec", "aiohttp", "google", "requests")  # packages, which have no error in common


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
        import fsspec.config
        import gcsfs  # noqa: F401  epath says less clearly that it is missing
        from etils import epath
    except ImportError as error:
        raise UserError(f"{os.fspath(path)} is in a bucket, which takes pip install 'lmm-jax[gcs]'") from error
    for protocol in ("gs", "gcs"):  # other hosts write there, too
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
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
    return as_path(path).exists() if is_remote(path) else os.path.exists(path)


def check_writable(folder: str | os.PathLike, name: str) -> None:
    """Writes a small file of that name to a bucket and removes it, rather than fail when there is much to lose.

    Raises:
      UserError: the bucket is not there, or may not be written to.
    """
    file = as_path(folder) / name
    try:
        with reaching(file):
            file.write_bytes(b"")
            file.unlink()
    except OSError as error:
        raise UserError(f"{os.fspath(folder)} cannot be written to ({error}): name another bucket") from error


def remove(folder: str | os.PathLike, *, but: Sequence[str] = ()) -> None:
    """Removes everything in a folder of a bucket but the files of these names."""
    files = _files(folder)
    gone = [path for name, path in files.items() if name not in but]
    if gone:
        _system().rm(gone)


def copy(source: str | os.PathLike, to: str | os.PathLike, *, last: str) -> None:
    """Copies a folder within buckets, the file of one name last."""
    files = _files(source)
    for name in sorted(files, key=lambda name: name == last):
        _system().copy(files[name], f"{os.fspath(to)}/{name}")


def _files(folder: str | os.PathLike) -> dict[str, str]:
    """Name as seen from the folder -> path."""
    start = os.fspath(folder).removeprefix(GS).rstrip("/") + "/"
    return {path.removeprefix(start): GS + path for path in _system().find(start)}


def _system() -> Any:
    import fsspec

    return fsspec.filesystem("gs")


@contextlib.contextmanager
def local(path: str | os.PathLike) -> Iterator[str]:
    """A file of this machine with the content of `path`: itself, or a copy that is gone afterwards."""
    if not is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.NamedTemporaryFile(suffix=os.path.splitext(os.fspath(path))[1]) as file:
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
    except Exception as error:
        if not is_on_the_way(error):
            raise
        raise OSError(f"{os.fspath(path)}: {str(error) or type(error).__name__}") from error


def is_on_the_way(error: Exception) -> bool:
    """Whether it is of those who carry files to and from buckets."""
    return type(error).__module__.partition(".")[0] in _CARRIERS

"""The arrays of a model folder on disk: a TensorStore database (OCDBT) of Zarr 3 arrays, laid out as Orbax lays out a PyTree.

Orbax restores the folder like any of its own checkpoints (a test does). It is written and read with TensorStore itself:
- Orbax cannot ask for checksums of array data: its Zarr 3 codecs are fixed. Here each chunk carries a CRC-32C, and no
  compression, which gains little on weights and costs most of the reading speed.
- Producing leaves one by one in Orbax means overriding private methods of its NumpyHandler, and saving starts the
  accelerator, which a conversion has no use for. All that Orbax needs besides the arrays is one JSON file, whose schema
  has to stay readable to it.
- Importing Orbax takes seconds that a question should not wait for.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lmm_jax import storage
from lmm_jax.errors import UserError

MANIFEST = "manifest.ocdbt"
CHUNK_BYTES = 4 * 2**20  # small enough for a device to read about its own slice, large enough to read at full speed
IN_FLIGHT_BYTES = 512 * 2**20  # leaves alive at once while writing, unless a single one is larger
READERS = 32  # threads that wait for the disk, most of the time
DATA_FILE_BYTES = 256 * 2**20  # TensorStore keeps up to this much in memory before it writes a file

# Chunks are mapped into memory to be read, as safetensors does: to find buffers for them takes the system longer than to read
# them. A file that another process cuts short meanwhile ends this one.
_MAPPED = {"file_io_mode": {"mode": "memmap"}, "data_copy_concurrency": {"limit": READERS}}
_DIRECT = {"file_io_mode": {"mode": "direct"}, "file_io_concurrency": {"limit": READERS}}


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """An array that is produced by ``read()`` only when it is written; ``read`` returns exactly `shape` and `dtype`.

    ``part`` reads no more than a slice, from starts to stops, where the source can; None where all has to be read for it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    part: Callable[[tuple[slice, ...]], np.ndarray] | None = None

    def take(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice."""
        return self.part(index) if self.part else self.read()[index]


def num_bytes(leaf: LazyLeaf | np.ndarray) -> int:
    """Bytes of a leaf once it is produced."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def write_arrays(
    folder: Path, leaves: Mapping[str, LazyLeaf | np.ndarray], progress: Callable[[int], None] | None = None
) -> None:
    """Writes a new array database; returns when everything is on the disk.

    Leaves are produced in order, in this thread, while earlier ones are being written; no more than `IN_FLIGHT_BYTES` of
    them (or one) are alive at a time. When it raises, no write is left running.

    Args:
      folder: absolute, new or empty.
      leaves: disk name ("layers.7.self_attn.q_proj.kernel") -> leaf.
      progress: called with the bytes of each leaf that is written.

    Raises:
      OSError: the disk refuses (full, not permitted, …).
      UserError: a leaf cannot be read from its own file.
      ValueError: a leaf produces another shape or dtype than it promised. What else `LazyLeaf.read` raises passes through.
    """
    context = _context()
    writing: collections.deque[tuple[int, ts.WriteFutures]] = collections.deque()

    def finish_oldest() -> None:
        size, future = writing[0]
        with _disk_errors():
            future.result()
        writing.popleft()
        if progress:
            progress(size)

    stores = _create(folder, leaves, context)
    try:
        for name, leaf in leaves.items():
            size = num_bytes(leaf)
            while writing and size + sum(n for n, _ in writing) > IN_FLIGHT_BYTES:
                finish_oldest()
            array = _produce(name, leaf)
            with _disk_errors():
                writing.append((size, stores[name].write(array, can_reference_source_data_indefinitely=True)))
            del array
        while writing:
            finish_oldest()
    finally:
        for _, future in writing:
            future.exception()  # waits
    (folder / "_METADATA").write_text(json.dumps(_orbax_metadata(leaves)))


def _create(folder: Path, leaves: Mapping[str, LazyLeaf | np.ndarray], context: ts.Context) -> dict[str, ts.TensorStore]:
    """The headers of all arrays, in one version of the index: each version stays in the database."""
    together = ts.Transaction()
    with _disk_errors():
        opening = {
            name: ts.open(_new_array(folder, name, leaf), context=context, create=True, transaction=together)
            for name, leaf in leaves.items()
        }
        stores = {name: future.result() for name, future in opening.items()}
        together.commit_async().result()
    return {name: store.with_transaction(None) for name, store in stores.items()}


def open_arrays(folder: Path, filling: int = 0) -> dict[str, ts.TensorStore]:
    """Disk name -> array, opened for reading; nothing but names, shapes and dtypes is read yet.

    Args:
      folder: of the database.
      filling: bytes of this machine's memory that what is going to be read takes, at most.

    Raises:
      ValueError: the database is missing or damaged (see `damage_is_a_user_error`).
    """
    kvstore = _kvstore(folder)
    context = _context(_way_of_reading(folder, filling))
    keys = ts.KvStore.open(kvstore, context=context).result().list().result()
    names = sorted(key.removesuffix(b"/zarr.json").decode() for key in keys if key.endswith(b"/zarr.json"))
    opening = {name: ts.open(_array(folder, name), context=context, read=True, open=True) for name in names}
    return {name: future.result() for name, future in opening.items()}


def open_array(folder: Path, name: str) -> ts.TensorStore:
    """One array of the database, opened for reading.

    Raises:
      ValueError: it is missing, or the database is damaged.
    """
    return ts.open(_array(folder, name), context=_context(_MAPPED), read=True, open=True).result()


def aligned_memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that starts at a multiple of 64 bytes, which lets a CPU device use it as it is rather than copy it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def start_reading(store: ts.TensorStore, part: tuple[slice, ...], target: np.ndarray) -> ts.WriteFutures:
    """Starts to read a part of `store`, cast to the dtype of `target`, which is contiguous and complete when the future is.

    The system's pages are taken beforehand: by chunks that arrive, several threads would take the same one at a time.
    """
    target.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE] = 0
    return ts.array(target, copy=False, write=True).write(ts.cast(store, target.dtype.name)[part])


@contextlib.contextmanager
def damage_is_a_user_error(folder: Path) -> Iterator[None]:
    """TensorStore's errors while reading, as one sentence; checksums that do not match are among them."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{folder} is damaged or cannot be read ({_reason(error)}): copy or convert it again") from error


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """TensorStore's errors while writing, as the OSError they stem from ("… No space left on device")."""
    try:
        yield
    except ValueError as error:
        raise OSError(_reason(error)) from error


def _reason(error: ValueError) -> str:
    """The innermost cause that TensorStore names: 'NOT_FOUND: Error …: Error …: cause [os_error_code='28'] […]'."""
    return re.sub(r" \[[\w ]+='.*", "", str(error), flags=re.DOTALL).rpartition(": ")[2]


def _produce(name: str, leaf: LazyLeaf | np.ndarray) -> np.ndarray:
    if isinstance(leaf, np.ndarray):
        return leaf
    try:
        array = leaf.read()
    except OSError as error:
        raise UserError(f"cannot read {name} ({error})") from error
    if array.shape != tuple(leaf.shape) or array.dtype != leaf.dtype:
        raise ValueError(f"{name} was to be {leaf.dtype}{list(leaf.shape)}, but came as {array.dtype}{list(array.shape)}")
    return array


def _way_of_reading(folder: Path, filling: int) -> dict[str, Any]:
    """`_MAPPED`, or `_DIRECT` where memory cannot hold the files beside what they fill.

    There the system would be busy making room for pages that nobody finds again, which takes longer than reading.
    """
    if storage.is_remote(folder):
        return _MAPPED  # as many threads, nothing is mapped
    files = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return _DIRECT if files + filling > _available_bytes() and _reads_directly(folder / MANIFEST) else _MAPPED


def _available_bytes(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that the system could give, what it keeps of files included; infinity where it does not tell (not Linux).

    A container may have less than the machine: its own group's limit (cgroup v2).
    """

    def number(file: Path, pattern: str) -> float:
        with contextlib.suppress(OSError):
            found = re.search(pattern, file.read_text(), re.MULTILINE)
            return int(found[1]) if found else math.inf
        return math.inf

    machine = 1024 * number(Path("/proc/meminfo"), r"^MemAvailable:\s*(\d+) kB$")
    limit = number(group / "memory.max", r"^(\d+)$")
    if limit == math.inf:
        return machine
    used = number(group / "memory.current", r"^(\d+)$") - number(group / "memory.stat", r"^file (\d+)$")
    return min(machine, limit - used)


def _reads_directly(file: Path) -> bool:
    """Whether a file can be read past the system's memory of files, which some file systems refuse."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            return bool(os.preadv(opened, [mmap.mmap(-1, mmap.PAGESIZE)], 0))
        finally:
            os.close(opened)
    except OSError:
        return False


def _context(reading: dict[str, Any] | None = None) -> ts.Context:
    """The index is kept in memory, array data is not; `reading` is `_MAPPED` or `_DIRECT`, None for what only writes."""
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 10**8}, **(reading or {})})


def _kvstore(folder: Path, path: str = "") -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder}/"}
    if storage.is_remote(folder):
        bucket, _, inside = str(folder).removeprefix(storage.GS).partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{inside}/"}
    return {"driver": "ocdbt", "base": base, "path": path, "cache_pool": "cache_pool#ocdbt"}


def _array(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": _kvstore(folder, f"{name}/"), "fill_missing_data_reads": False}


def _new_array(folder: Path, name: str, leaf: LazyLeaf | np.ndarray) -> dict[str, Any]:
    spec = _array(folder, name)
    # A leaf's Zarr header stays in the index, so that opening it needs no read of its own.
    spec["kvstore"] |= {"target_data_file_size": DATA_FILE_BYTES, "config": {"max_inline_value_bytes": 1024}}
    chunk = chunk_shape(tuple(leaf.shape), np.dtype(leaf.dtype).itemsize)
    metadata = {
        "shape": list(leaf.shape),
        "data_type": np.dtype(leaf.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    return spec | {"metadata": metadata, "store_data_equal_to_fill_value": True}


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Halves all axes in turn, long ones first, to `CHUNK_BYTES` or less, since any axis may be split between devices."""
    chunk, halvings = list(shape), [0] * len(shape)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        axis = min((a for a, n in enumerate(chunk) if n > 1), key=lambda a: (halvings[a], -chunk[a]))
        chunk[axis] = -(-chunk[axis] // 2)
        halvings[axis] += 1
    return tuple(chunk)


def _orbax_metadata(names: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a PyTree checkpoint in Orbax's ``_METADATA`` file: nested dicts of NumPy arrays."""
    tree = {}
    for name in names:
        keys = name.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }

"""Arrays of a model folder -> the devices of a mesh, each of which is given its own slice."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from lmm_jax import checkpoint_io

PIECE_BYTES = 64 * 2**20  # of an array are asked for at once, or one row of its chunks
THREADS = min(8, os.cpu_count() or 1)  # that make memory ready, which the system takes long to supply

_Bounds = tuple[tuple[int, int], ...]  # starts and stops


@dataclasses.dataclass(frozen=True)
class Source:
    """An array to read.

    Attributes:
      path: what it is called.
      stores: it on disk, or, of a stack, each layer.
      leaf: its shape, dtype and sharding in memory.
      is_stack: whether it is one, (L, …), which is never split along L.
    """

    path: str
    stores: Sequence[ts.TensorStore]
    leaf: jax.ShapeDtypeStruct
    is_stack: bool


class _Growing:
    """The memory of an array that is being read, its pieces, and how many of them are not there yet."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.pieces = list(_pieces(source))
        self.missing = len(self.pieces)
        self._memory: dict[_Bounds, np.ndarray] = {}

    def memory(self, part: _Bounds) -> np.ndarray:
        """A slice's, (L, …) in any case."""
        if part not in self._memory:
            self._memory[part] = checkpoint_io.aligned_memory(_shape(part), self.source.leaf.dtype)
        return self._memory[part] if self.source.is_stack else self._memory[part][None]

    def take(self) -> jax.Array:
        """The whole array; nothing here keeps its memory."""
        memory, self._memory = self._memory, {}
        leaf = self.source.leaf
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: memory[_bounds(index, leaf.shape)], dtype=leaf.dtype
        )


def read_in_order(folder: Path, sources: Sequence[Source]) -> Iterator[tuple[str, jax.Array]]:
    """Reads what devices of this process hold, and no more; while one array is handed over, those after it are being read.

    Args:
      folder: for messages.
      sources: whose paths are given back with the arrays.

    Raises:
      UserError: damaged data.
    """
    most = ahead_bytes(sum(_bytes(source.leaf) for source in sources))
    reading: collections.deque[tuple[int, _Growing, Future[ts.WriteFutures]]] = collections.deque()

    def finish_oldest() -> _Growing:
        _, array, started = reading.popleft()
        reads = started.result()
        with checkpoint_io.damage_is_a_user_error(folder):
            reads.result()
        array.missing -= 1
        return array

    pool = ThreadPoolExecutor(THREADS, "reading")
    try:
        for array in map(_Growing, sources):
            for part, store, wanted, place in array.pieces:
                size = math.prod(_shape(wanted)) * array.source.leaf.dtype.itemsize
                while reading and size + sum(n for n, *_ in reading) > most:
                    if not (oldest := finish_oldest()).missing:
                        yield oldest.source.path, oldest.take()
                target = array.memory(part)[place]
                index = tuple(slice(*bounds) for bounds in wanted)
                reading.append((size, array, pool.submit(checkpoint_io.start_reading, store, index, target)))
                del target  # no name may keep the memory
        while reading:
            if not (oldest := finish_oldest()).missing:
                yield oldest.source.path, oldest.take()
    finally:
        pool.shutdown(cancel_futures=True)


def ahead_bytes(total: int) -> int:
    """Of arrays that are being read at once, unless a single piece is larger: they keep a disk busy and are little in all."""
    return max(64 * 2**20, total // 32)


def host_bytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Of arrays, what stays in this machine's memory: what this process holds on processors."""
    return sum(_bytes(leaf) for leaf in leaves if next(iter(leaf.sharding.device_set)).platform == "cpu")


def layer_of(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One layer (…) of a stack (L, …)."""
    sharding = NamedSharding(stack.sharding.mesh, PartitionSpec(*stack.sharding.spec[1:]))
    return stack.update(shape=stack.shape[1:], sharding=sharding)


def _pieces(source: Source) -> Iterator[tuple[_Bounds, ts.TensorStore, _Bounds, tuple]]:
    """Of each slice of a source: the slice, a store, what of it, and where that belongs in `_Growing.memory`."""
    for part in _slices(source.leaf):
        (first, last), *inside = part if source.is_stack else ((0, 1), *part)
        for layer in range(first, last):
            store = source.stores[layer]
            for rows in _cut(store, inside, source.leaf.dtype.itemsize):
                place = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(rows, inside))
                yield part, store, rows, (layer - first, *place, ...)


def _cut(store: ts.TensorStore, part: Sequence[tuple[int, int]], itemsize: int) -> Iterator[_Bounds]:
    """Cuts a part of an array into pieces along its first axis, between chunks."""
    if not part:
        yield ()
        return
    (start, stop), *others = part
    height = store.chunk_layout.read_chunk.shape[0]
    each = max(1, PIECE_BYTES // max(1, height * math.prod(_shape(others)) * itemsize)) * height
    edges = [start, *range(start - start % each + each, stop, each), stop]
    yield from ((edge, *others) for edge in zip(edges, edges[1:]))


def _slices(leaf: jax.ShapeDtypeStruct) -> set[_Bounds]:
    """What devices of this process hold."""
    return {_bounds(index, leaf.shape) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return sum(math.prod(_shape(part)) for part in _slices(leaf)) * leaf.dtype.itemsize


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def _shape(part: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in part)

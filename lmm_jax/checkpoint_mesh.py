"""Arrays of a model folder -> the devices of a mesh, each of which is given its own slice."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from lmm_jax import checkpoint_io

_Bounds = tuple[tuple[int, int], ...]  # starts and stops
_Parts = dict[_Bounds, tuple[np.ndarray, ts.WriteFutures]]


def read_in_order(
    folder: Path, sources: Sequence[tuple[str, ts.TensorStore, jax.ShapeDtypeStruct]]
) -> Iterator[tuple[str, jax.Array]]:
    """Reads what devices of this process hold, and no more; while one array is handed over, those after it are being read.

    Args:
      folder: for messages.
      sources: (path, array on disk, its shape, dtype and sharding in memory); paths are given back with the arrays.

    Raises:
      UserError: damaged data.
    """
    reading: collections.deque[tuple[str, jax.ShapeDtypeStruct, _Parts]] = collections.deque()
    most = ahead_bytes(sum(_bytes(leaf) for *_, leaf in sources))
    for path, store, leaf in sources:
        while reading and _bytes(leaf) + sum(a.nbytes for *_, parts in reading for a, _ in parts.values()) > most:
            yield _finish(folder, *reading.popleft())
        parts = {key: _start(store, key, leaf.dtype) for key in _slices(leaf)}
        reading.append((path, leaf, parts))
        del parts  # no name may keep the memory
    while reading:
        yield _finish(folder, *reading.popleft())


def ahead_bytes(total: int) -> int:
    """Of arrays that are being read at once, unless a single one is larger: they keep a disk busy and are little in all."""
    return max(64 * 2**20, total // 32)


def _slices(leaf: jax.ShapeDtypeStruct) -> set[_Bounds]:
    """What devices of this process hold."""
    return {_bounds(index, leaf.shape) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return sum(math.prod(stop - start for start, stop in key) for key in _slices(leaf)) * leaf.dtype.itemsize


def _start(store: ts.TensorStore, bounds: _Bounds, dtype: np.dtype) -> tuple[np.ndarray, ts.WriteFutures]:
    return checkpoint_io.start_reading(store, tuple(slice(*part) for part in bounds), dtype)


def _finish(folder: Path, path: str, leaf: jax.ShapeDtypeStruct, parts: _Parts) -> tuple[str, jax.Array]:
    with checkpoint_io.damage_is_a_user_error(folder):
        for _, done in parts.values():
            done.result()

    def at(index: tuple[slice, ...]) -> np.ndarray:
        return parts[_bounds(index, leaf.shape)][0]

    return path, jax.make_array_from_callback(leaf.shape, leaf.sharding, at, dtype=leaf.dtype)


def layer_of(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One layer (…) of a stack (L, …)."""
    sharding = NamedSharding(stack.sharding.mesh, PartitionSpec(*stack.sharding.spec[1:]))
    return stack.update(shape=stack.shape[1:], sharding=sharding)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))

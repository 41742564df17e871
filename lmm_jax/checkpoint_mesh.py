"""Arrays of a model folder -> the devices of a mesh, each of which is given its own slice."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from lmm_jax import checkpoint_io

AHEAD_BYTES = 64 * 2**20  # arrays that are being read at once, unless a single one is larger

_Parts = dict[tuple[tuple[int, int], ...], tuple[np.ndarray, ts.WriteFutures]]  # by their starts and stops


def read_in_order(
    folder: Path, sources: Iterable[tuple[str, ts.TensorStore, jax.ShapeDtypeStruct]]
) -> Iterator[tuple[str, jax.Array]]:
    """Reads what devices of this process hold, and no more; while one array is handed over, those after it are being read.

    Args:
      folder: for messages.
      sources: (path, array on disk, its shape, dtype and sharding in memory); paths are given back with the arrays.

    Raises:
      UserError: damaged data.
    """
    reading: collections.deque[tuple[str, jax.ShapeDtypeStruct, _Parts]] = collections.deque()
    for path, store, leaf in sources:
        slices = {_bounds(index, leaf.shape) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
        size = sum(math.prod(stop - start for start, stop in key) for key in slices) * leaf.dtype.itemsize
        while reading and size + sum(a.nbytes for *_, parts in reading for a, _ in parts.values()) > AHEAD_BYTES:
            yield _finish(folder, *reading.popleft())
        reading.append((path, leaf, {key: _start(store, key, leaf.dtype) for key in slices}))  # no name may keep the memory
    while reading:
        yield _finish(folder, *reading.popleft())


def _start(store: ts.TensorStore, bounds: tuple[tuple[int, int], ...], dtype: np.dtype) -> tuple[np.ndarray, ts.WriteFutures]:
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


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))

"""Value transforms between a Hugging Face tensor and a leaf of ours: pure, invertible, and blind to names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]

_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout that keeps every value and dtype.

    Attributes:
      forward: (tensor, shape of the leaf) -> leaf.
      inverse: (leaf, shape of the tensor) -> tensor, so that ``inverse(forward(t, shape), t.shape)`` is ``t`` bit for bit.
    """

    forward: Callable[[np.ndarray, Shape], np.ndarray]
    inverse: Callable[[np.ndarray, Shape], np.ndarray]


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous copy of the transposed matrix, (a, b) -> (b, a), any dtype.

    By blocks that fit the cache: several times faster than NumPy's own copy on the matrices of a large model.
    """
    rows, columns = matrix.shape
    out = np.empty((columns, rows), matrix.dtype)
    for i in range(0, rows, _BLOCK):
        for j in range(0, columns, _BLOCK):
            out[j : j + _BLOCK, i : i + _BLOCK] = matrix[i : i + _BLOCK, j : j + _BLOCK].T
    return out


# Norm scales, embeddings, biases; a bias (N*H,) becomes (N, H).
RESHAPE = Transform(lambda t, shape: t.reshape(shape), lambda leaf, shape: leaf.reshape(shape))

# A torch Linear weight (out, in) becomes a kernel (in..., out...) whose heads have axes of their own: (D, N, H) or (N, H, D).
LINEAR = Transform(lambda t, shape: transpose(t).reshape(shape), lambda leaf, shape: transpose(leaf.reshape(shape[::-1])))

# A torch convolution (Dv, 3, p, p) that cuts patches becomes a matrix (p*p*3, Dv), rows in (row, column, channel) order.
PATCHES = Transform(
    lambda t, shape: t.transpose(2, 3, 1, 0).reshape(shape),
    lambda leaf, shape: leaf.reshape(shape[2], shape[3], shape[1], shape[0]).transpose(3, 2, 0, 1),
)

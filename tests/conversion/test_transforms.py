import ml_dtypes
import numpy as np
import pytest

from conversion.names import Entry
from conversion.transforms import LINEAR, PATCHES, RESHAPE, transpose

RNG = np.random.default_rng(0)


def random_bits(shape, dtype):
    """Every bit pattern, NaNs with payload among them."""
    return RNG.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]


@pytest.mark.parametrize("shape", [(3, 5), (256, 512), (300, 1), (257, 700)])
def test_transpose(shape):
    matrix = RNG.standard_normal(shape)
    assert np.array_equal(transpose(matrix), matrix.T)
    assert transpose(matrix).flags.c_contiguous


def test_linear_multiplies_from_the_other_side():
    x, w = RNG.standard_normal((2, 6)), RNG.standard_normal((12, 6))
    heads = LINEAR.forward(w, (6, 3, 4))
    np.testing.assert_allclose(np.einsum("bd,dnh->bnh", x, heads).reshape(2, 12), x @ w.T)
    y, o = RNG.standard_normal((2, 12)), RNG.standard_normal((6, 12))
    out = LINEAR.forward(o, (3, 4, 6))
    np.testing.assert_allclose(np.einsum("bnh,nhd->bd", y.reshape(2, 3, 4), out), y @ o.T)


def test_patches_order_is_row_column_channel():
    conv = RNG.standard_normal((8, 3, 2, 2))
    picture = RNG.standard_normal((3, 2, 2))  # channel, row, column
    kernel = PATCHES.forward(conv, (12, 8))
    np.testing.assert_allclose(picture.transpose(1, 2, 0).reshape(-1) @ kernel, np.einsum("ocrk,crk->o", conv, picture))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(
    "shape, leaves, transform",
    [
        ((12, 6), [(6, 3, 4)], LINEAR),
        ((6, 12), [(3, 4, 6)], LINEAR),
        ((36, 12), [(12, 3, 4)] * 3, LINEAR),
        ((36,), [(3, 4)] * 3, RESHAPE),
        ((8, 3, 2, 2), [(12, 8)], PATCHES),
        ((5, 6), [(5, 6)], RESHAPE),
    ],
)
def test_joining_leaves_restores_every_bit(dtype, shape, leaves, transform):
    entry = Entry("t", shape, tuple((str(i), leaf) for i, leaf in enumerate(leaves)), transform)
    tensor = random_bits(shape, dtype)
    parts = [entry.leaf(i, tensor) for i in range(len(leaves))]
    assert [p.shape for p in parts] == leaves
    back = entry.join(parts)
    assert (back.shape, back.dtype, back.tobytes()) == (shape, np.dtype(dtype), tensor.tobytes())


def test_packed_parts_are_in_order():
    entry = Entry("t", (6,), (("q", (2,)), ("k", (2,)), ("v", (2,))), RESHAPE)
    assert [entry.leaf(i, np.arange(6)).tolist() for i in range(3)] == [[0, 1], [2, 3], [4, 5]]

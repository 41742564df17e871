"""Quantised weights: the numbers themselves, and models that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import slow, trained_params

import lmm_jax
from lmm_jax.config import QUANTIZATIONS
from lmm_jax.data.layout import Row
from lmm_jax.errors import UserError
from lmm_jax.models import quantization
from lmm_jax.sharding import leaf_paths

SHAPES = [((96,), (40,)), ((256,), (4, 16)), ((6, 32), (24,))]


@pytest.mark.parametrize("inputs,outputs", SHAPES)
@pytest.mark.parametrize("kind,largest", [("int8", 127), ("int4", 7)])
def test_values_are_the_nearest(inputs, outputs, kind, largest):
    kernel = np.random.default_rng(0).normal(size=(*inputs, *outputs)).astype(np.float32)
    kernel[..., 0] = 0  # an output of nothing
    found = quantization.quantize(jnp.asarray(kernel), inputs=len(inputs), kind=kind)
    assert found["values"].dtype == kind and np.isfinite(found["scale"]).all()
    values, scale = np.asarray(found["values"]).astype(np.float32), np.asarray(found["scale"])
    assert np.abs(values).max() == largest
    whole = values * (scale[:, None] if kind == "int4" else scale)
    limit = (scale[:, None] if kind == "int4" else scale) / 2
    assert (np.abs(whole - kernel.reshape(whole.shape)) <= limit + 1e-6).all()


@pytest.mark.parametrize("inputs,outputs", SHAPES)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("rows", [3, quantization.FEW + 1])
def test_products(inputs, outputs, kind, rows):
    """As with the kernel that the values stand for."""
    rng = np.random.default_rng(1)
    kernel, x = rng.normal(size=(*inputs, *outputs)), rng.normal(size=(rows, *inputs)).astype(np.float32)
    found = quantization.quantize(jnp.asarray(kernel, jnp.float32), inputs=len(inputs), kind=kind)
    scale = np.asarray(found["scale"])
    whole = np.asarray(found["values"]).astype(np.float64) * (scale[:, None] if kind == "int4" else scale)
    expected = np.tensordot(x.astype(np.float64), whole.reshape(kernel.shape), axes=len(inputs))
    y = quantization.project(jnp.asarray(x), found, len(inputs), None)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def logits(model):
    ids = np.random.default_rng(2).integers(5, 200, 20).astype(np.int32)
    ids[3] = -200
    pixels = np.random.default_rng(3).integers(0, 256, (1, 56, 56, 3), np.uint8)
    return model.engine.logits([Row(ids, (1,))], [[pixels]])[0]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=4", *slow(None)])
def test_a_model_of_few_bits(tiny, kind, mesh):
    """Computes what the same model does whose kernels are the rounded ones."""
    whole, small = lmm_jax.load(tiny("tiny")), lmm_jax.load(tiny("tiny"), quantize=kind, mesh=mesh)
    leaves = leaf_paths(small.engine.params)
    kept = {path.removesuffix("/values") for path in leaves if path.endswith("/values")}
    assert len(kept) == 2 * 2 * 7 + 1 and "lm_head/kernel" in kept  # layers and pre-fusion, stacked and last
    assert {str(leaves[f"{path}/values"].dtype) for path in kept} == ({"int8", "int4"} if kind == "int4" else {"int8"})
    if mesh:
        assert not leaves["layers/stack/mlp/up_proj/kernel/values"].sharding.is_fully_replicated
    before, params = logits(whole), trained_params(whole)
    rounded = {}
    for path, leaf in leaf_paths(params).items():
        if path in kept:
            leaf = rounded_kernel(leaves[f"{path}/values"], leaves[f"{path}/scale"], leaf.shape, "/stack/" in path)
        rounded[path] = leaf
    same = lmm_jax.load(tiny("tiny"))
    same.engine.params = jax.tree.unflatten(jax.tree.structure(params), list(rounded.values()))
    expected, found = logits(same), logits(small)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert np.linalg.norm(found - before) > 1e-3 * np.linalg.norm(before)


def rounded_kernel(values, scale, shape, stacked):
    """Of a layer, or of stacked ones."""
    if stacked:
        return np.stack([rounded_kernel(v, s, shape[1:], False) for v, s in zip(values, scale)])
    scale = np.asarray(scale) if values.dtype == "int8" else np.asarray(scale)[:, None]
    return (np.asarray(values).astype(np.float32) * scale).reshape(shape)


@pytest.mark.slow
def test_it_answers(tiny):
    model = lmm_jax.load(tiny("tiny"), quantize="int4")
    assert model.ask_batch(["What?", "And a longer one?"], max_new_tokens=4) == [
        model.ask("What?", max_new_tokens=4),
        model.ask("And a longer one?", max_new_tokens=4),
    ]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.engine.params["layers"]))
    assert held < 0.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(lmm_jax.load(tiny("tiny")).engine.params["layers"]))


def test_an_unknown_kind(tiny):
    with pytest.raises(UserError, match="int8, int4"):
        lmm_jax.load(tiny("tiny"), quantize="int2")

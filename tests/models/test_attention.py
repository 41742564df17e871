"""Every attention kernel against float64 arithmetic, alone and on a mesh, and which of them runs where."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import relative_error

from lmm_jax.config import named_sizes
from lmm_jax.errors import UserError
from lmm_jax.models import attention, kv_cache
from lmm_jax.models.llava_mini import LlavaMini, abstract_params
from lmm_jax.sharding import make_mesh

attend = jax.jit(attention.attend, static_argnames=("causal", "implementation"))
RUN_HERE = ("plain", "blocks", "splash_interpret")
# batch, queries, keys, heads, key heads, channels; no length is a multiple of a block
SHAPES = {
    "square": (2, 200, 200, 4, 4, 16),
    "grouped": (2, 200, 200, 6, 2, 16),
    "several blocks": (1, 700, 700, 2, 1, 8),
    "text after image": (2, 7, 130, 4, 2, 16),
    "long text after image": (1, 400, 577, 2, 2, 8),
}
TOLERANCE = {np.float32: 1e-6, jnp.bfloat16: 1e-2}


def draw(shape, dtype=np.float32):
    batch, queries, keys, heads, key_heads, channels = shape
    rng = np.random.default_rng(0)
    sizes = ((batch, queries, heads, channels), *((batch, keys, key_heads, channels),) * 2)
    return tuple(jnp.asarray(rng.standard_normal(size), dtype) for size in sizes)


def reference(q, k, v, seen):
    """Loops over heads; `seen` (T,S) or (B,T,S)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for n in range(q.shape[2]):
        scores = q[:, :, n] @ k[:, :, n // group].swapaxes(1, 2) / q.shape[-1] ** 0.5
        weights = np.where(seen, np.exp(scores - scores.max()), 0)
        out[:, :, n] = weights / weights.sum(-1, keepdims=True) @ v[:, :, n // group]
    return out


def triangle(q, k):
    """The last query sees every key, the one before all but the last, …"""
    queries, keys = q.shape[1], k.shape[1]
    return np.array([[s < keys - (queries - 1 - t) for s in range(keys)] for t in range(queries)])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("implementation", RUN_HERE)
def test_causal(implementation, shape, dtype):
    q, k, v = draw(shape, dtype)
    out = attend(q, k, v, causal=True, implementation=implementation)
    assert out.dtype == dtype
    assert relative_error(out, reference(q, k, v, triangle(q, k))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("implementation", RUN_HERE)
def test_full(implementation, dtype):
    for name in ("grouped", "text after image", "long text after image"):
        q, k, v = draw(SHAPES[name], dtype)
        out = attend(q, k, v, implementation=implementation)
        assert relative_error(out, reference(q, k, v, True)) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", (*RUN_HERE, "cudnn", "splash"))
@pytest.mark.parametrize("queries", (1, 5, 300))
def test_mask(implementation, queries):
    """A kernel that cannot mask must not be taken, even if it is named."""
    q, k, v = draw((2, queries, 313, 4, 2, 16))
    mask = np.random.default_rng(1).random((2, queries, 313)) < 0.3
    out = attend(q, k, v, mask=mask, implementation=implementation)
    assert relative_error(out, reference(q, k, v, mask)) < 1e-6


@functools.partial(jax.jit, static_argnames="name")
def output_and_gradients(q, k, v, name):
    """Causal attention, and what comes back to q, k and v from the sum of squares of its output."""

    def loss(*x):
        out = attention.attend(*x, causal=True, implementation=name)
        return (out.astype(jnp.float32) ** 2).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("implementation", ("blocks", "splash_interpret"))
@pytest.mark.parametrize("shape", ("grouped", "several blocks", "long text after image"))
def test_gradients(implementation, shape):
    x = draw(SHAPES[shape])
    for got, expected in zip(output_and_gradients(*x, implementation), output_and_gradients(*x, "plain")):
        assert relative_error(got, expected) < 2e-6


def test_what_cannot_be_asked():
    q, k, v = draw((1, 4, 4, 2, 2, 8))
    with pytest.raises(UserError, match="'flash'.*auto, plain, blocks, cudnn, splash"):
        attend(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="not both"):
        attend(q, k, v, causal=True, mask=np.ones((1, 4, 4), bool))


# ---- on a mesh ------------------------------------------------------------------------------------------------------

# what the mesh divides -> shape, and the part of the output (batch, queries, heads, channels) that one device has
SHARDED = {
    "rows and heads": ((4, 130, 130, 4, 2, 16), (1, 130, 2, 16)),
    "rows and query heads": ((4, 130, 130, 6, 3, 16), (1, 130, 3, 16)),
    "query heads": ((3, 130, 130, 2, 1, 16), (3, 130, 1, 16)),
    "nothing": ((3, 130, 130, 3, 3, 16), (3, 130, 3, 16)),
}


@pytest.mark.parametrize("implementation", ("blocks", "splash_interpret", "cudnn"))
@pytest.mark.parametrize("shape, part", SHARDED.values(), ids=SHARDED)
def test_mesh(implementation, shape, part, cudnn_by_xla):
    dtype = jnp.bfloat16 if implementation == "cudnn" else np.float32
    x = draw(shape, dtype)
    expected = output_and_gradients(*x, "plain")
    with jax.set_mesh(make_mesh("data=2,fsdp=2,tensor=2")):
        got = output_and_gradients(*x, implementation)
    if implementation != "blocks":  # which the partitioner is free to lay out
        assert got[0].sharding.shard_shape(got[0].shape) == part
    for g, e in zip(got, expected):
        assert relative_error(g, e) < (2e-2 if implementation == "cudnn" else 2e-6)


# ---- cuDNN, without a GPU -------------------------------------------------------------------------------------------


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """XLA computes what cuDNN is asked for."""
    original = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **options):
        return original(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("length", (31, 32))
def test_cudnn_is_asked_for_the_right_thing(causal, length, cudnn_by_xla):
    q, k, v = draw((2, length, length, 4, 2, 16), jnp.bfloat16)
    assert attention._choose("cudnn", q, k, causal, None) == "cudnn"
    out = attention.attend(q, k, v, causal=causal, implementation="cudnn")  # not from jit's cache
    assert relative_error(out, reference(q, k, v, triangle(q, k) if causal else True)) < 1e-2


@pytest.mark.parametrize("mesh", ("data=1", "data=2,fsdp=2,tensor=2", "tensor=8"))
@pytest.mark.parametrize("shape, causal", (((4, 577, 577, 16, 16, 64), False), ((4, 577, 577, 8, 2, 128), True)))
def test_cudnn_takes_it(mesh, shape, causal, monkeypatch):
    """JAX's own checks pass, forwards and backwards, and each device calls the kernel for its own rows and heads."""
    kernel = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 90800)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda capability: capability == "8.0")
    mesh = make_mesh(mesh)

    def loss(*x):
        return attention.attend(*x, causal=causal, implementation="cudnn").astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*draw(shape, jnp.bfloat16))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    batch, _, _, heads, key_heads, channels = shape
    own_heads = heads // mesh.shape["tensor"]
    own_key_heads = max(key_heads // mesh.shape["tensor"], 1)
    own = f"tensor<{batch // (mesh.shape['data'] * mesh.shape['fsdp'])}x578"
    arguments = f"({own}x{own_heads}x{channels}xbf16>, {own}x{own_key_heads}x{channels}xbf16>"
    calls = [line for line in program.splitlines() if "@__cudnn$fmhaSoftmax" in line]
    assert ["Backward" in call for call in calls] == [False, True]
    assert all(arguments in call for call in calls)


# ---- the choice -----------------------------------------------------------------------------------------------------

LONG, SHORT, TEXT, STEP = (2048, 2048), (577, 577), (640, 2048), (1, 2048)
TPU, AMPERE, TURING, AMD, CPU = ("tpu", ""), ("gpu", "8.0"), ("gpu", "7.5"), ("gpu", "gfx942"), ("cpu", "")
CHOICES = [
    # platform, (queries, keys), channels, dtype, causal | masked | full, choice
    (CPU, LONG, 128, "float32", "causal", "blocks"),
    (CPU, LONG, 128, "float32", "masked", "blocks"),
    (CPU, SHORT, 64, "float32", "full", "plain"),
    (CPU, STEP, 128, "float32", "masked", "plain"),
    (TPU, LONG, 128, "bfloat16", "causal", "splash"),
    (TPU, LONG, 64, "bfloat16", "causal", "splash"),
    (TPU, TEXT, 128, "bfloat16", "causal", "splash"),
    (TPU, SHORT, 128, "bfloat16", "causal", "plain"),
    (TPU, LONG, 128, "bfloat16", "full", "blocks"),
    (TPU, LONG, 128, "bfloat16", "masked", "blocks"),
    (TPU, STEP, 128, "bfloat16", "masked", "plain"),
    (AMPERE, LONG, 128, "bfloat16", "causal", "cudnn"),
    (AMPERE, LONG, 128, "float16", "causal", "cudnn"),
    (AMPERE, SHORT, 64, "bfloat16", "full", "cudnn"),
    (AMPERE, TEXT, 128, "bfloat16", "full", "cudnn"),
    (AMPERE, TEXT, 128, "bfloat16", "causal", "blocks"),
    (AMPERE, LONG, 128, "float32", "causal", "blocks"),
    (AMPERE, LONG, 256, "bfloat16", "causal", "blocks"),
    (AMPERE, LONG, 20, "bfloat16", "causal", "blocks"),
    (AMPERE, LONG, 128, "bfloat16", "masked", "blocks"),
    (AMPERE, STEP, 128, "bfloat16", "masked", "plain"),
    (AMPERE, (1, 1), 128, "bfloat16", "causal", "plain"),
    (TURING, LONG, 128, "float16", "causal", "blocks"),
    (AMD, LONG, 128, "bfloat16", "causal", "blocks"),
]


@pytest.mark.parametrize("where, lengths, channels, dtype, kind, choice", CHOICES)
def test_auto(where, lengths, channels, dtype, kind, choice, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: where[0])
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=where[1])])
    q, k = (jax.ShapeDtypeStruct((2, n, heads, channels), dtype) for n, heads in zip(lengths, (8, 2)))
    mask = jax.ShapeDtypeStruct((2, *lengths), bool) if kind == "masked" else None
    assert attention._choose("auto", q, k, kind == "causal", mask) == choice


@pytest.mark.slow
def test_a_model_runs_with_a_kernel_that_cannot_do_everything():
    """Pictures, text after them, prompt and next token, of which this kernel does half, give what `plain` gives."""
    config = dataclasses.replace(named_sizes()["tiny"], prefusion_layers=2)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(s.dtype), abstract_params(config, make_mesh()))
    pixels = rng.integers(0, 256, (1, 1, 56, 56, 3), np.uint8)
    ids = np.arange(1, 8)[None]

    @functools.partial(jax.jit, static_argnames="name")
    def run(params, name):
        call = functools.partial(LlavaMini(config, jnp.float32, name).apply, {"params": params})
        prefix = call(pixels, method="encode_image")
        text = call(call(ids, method="embed"), prefix, method="fuse_text")
        x = jnp.concatenate([prefix.tokens, text], axis=1)
        last = jnp.array([x.shape[1] - 1])
        cache = kv_cache.empty(config.decoder, 1, x.shape[1] + 1, jnp.float32)
        prompt, cache = call(x, cache=cache, queries=last[:, None], method="decode")
        return prompt, call(x[:, :1], cache=cache, write_at=last + 1, method="decode")[0]

    for got, expected in zip(run(params, "splash_interpret"), run(params, "plain")):
        assert relative_error(got, expected) < 1e-5

"""Keys and values in floating point and in 8 bits: what is written, what a decode step reads, what a model answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from support import relative_error

import lmm_jax
from lmm_jax.config import named_sizes
from lmm_jax.data.layout import Row
from lmm_jax.errors import UserError
from lmm_jax.inference.engine import Request
from lmm_jax.inference.sampling import Sampling
from lmm_jax.models import kv_cache
from lmm_jax.models.attention import attend

CONFIG = named_sizes()["tiny"].decoder
ROWS, LENGTH, PROMPT = 3, 12, 7


def values(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def new(seed, tokens, dtype=np.float32):
    shape = (ROWS, tokens, CONFIG.num_kv_heads, CONFIG.head_dim)
    return tuple(jnp.asarray(values(seed + i, *shape), dtype) for i in range(2))


def plain(half):
    """Keys or values as numbers, (…,H) float32."""
    values, scale = (half["values"], half["scale"][..., None]) if isinstance(half, dict) else (half, 1)
    return np.asarray(values.view(jnp.bfloat16) if values.dtype == jnp.uint16 else values, np.float32) * scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("part", ["stack", "0"])
def test_what_is_written(dtype, part):
    """Prompts at the start, one token at each row's place, none where a row has come to its end; the rest stays."""
    cache = kv_cache.empty(CONFIG, ROWS, LENGTH, dtype, apart=part != "stack")[part]
    layer = jnp.int32(CONFIG.num_layers - 1) if part == "stack" else None
    prompts, token = new(0, PROMPT, dtype if dtype != jnp.int8 else jnp.float32), new(2, 1)
    at = np.array([7, 3, LENGTH])
    cache = kv_cache.write(kv_cache.write(cache, prompts, layer), token, layer, jnp.asarray(at))
    mine = cache if layer is None else jax.tree.map(lambda c: c[layer], cache)
    for found, written, one in zip(mine, prompts, token):
        expected = np.zeros((ROWS, CONFIG.num_kv_heads, LENGTH, CONFIG.head_dim), np.float32)
        expected[:, :, :PROMPT] = np.asarray(written, np.float32).swapaxes(1, 2)
        for row in range(2):
            expected[row, :, at[row]] = one[row, 0]
        error = np.abs(plain(found) - expected)
        largest = np.abs(expected).max(-1, keepdims=True)
        assert (error <= largest * {jnp.float32: 0, jnp.bfloat16: 2**-8, jnp.int8: 0.501 / 127}[dtype]).all()
    others = jax.tree.map(lambda x: x[: CONFIG.num_layers - 1], cache) if layer is not None else ()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(others))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("part", ["stack", "0"])
@pytest.mark.parametrize("length", [LENGTH, 3 * kv_cache.BLOCK, kv_cache.BLOCK + 1])
def test_a_decode_step_attends_to_what_is_kept(dtype, part, length):
    """At once, and block by block as far as each row goes: in the first, over the edge of one, to the end."""
    layer = jnp.int32(CONFIG.num_layers - 1) if part == "stack" else None
    cache = kv_cache.write(kv_cache.empty(CONFIG, ROWS, length, dtype, apart=part != "stack")[part], new(0, length), layer)
    q = jnp.asarray(values(5, ROWS, 1, CONFIG.num_heads, CONFIG.head_dim))
    mine = cache if layer is None else jax.tree.map(lambda c: c[layer], cache)
    k, v = (rearrange(jnp.asarray(plain(half)), "b k s h -> b s k h") for half in mine)
    for position in ([0, 5, length - 1], [0, 0, 0], [0, min(length, kv_cache.BLOCK) - 1, min(length - 1, kv_cache.BLOCK)]):
        position = jnp.array(position)
        mask = jnp.arange(length) <= position[:, None, None]
        assert relative_error(kv_cache.attend(q, cache, position, layer), attend(q, k, v, mask=mask)) < 1e-6


def test_blocks_that_a_row_has_not_reached_are_not_read():
    """What lies there may be anything: it costs nothing and changes nothing."""
    blocks = np.arange(ROWS) + 1
    length = (ROWS + 1) * kv_cache.BLOCK
    cache = kv_cache.write(kv_cache.empty(CONFIG, ROWS, length, jnp.float32, apart=True)["0"], new(0, length))
    is_beyond = np.arange(length) >= blocks[:, None] * kv_cache.BLOCK
    spoilt = jax.tree.map(lambda c: jnp.where(is_beyond[:, None, :, None], jnp.nan, c), cache)
    q = jnp.asarray(values(5, ROWS, 1, CONFIG.num_heads, CONFIG.head_dim))
    for position in (blocks * kv_cache.BLOCK - 1, (blocks - 1) * kv_cache.BLOCK):
        found = kv_cache.attend(q, spoilt, jnp.asarray(position))
        np.testing.assert_array_equal(found, kv_cache.attend(q, cache, jnp.asarray(position)))


def test_bytes_of_a_position():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        for is_apart in (False, True):
            leaves = jax.tree.leaves(kv_cache.empty(CONFIG, ROWS, LENGTH, dtype, apart=is_apart))
            assert sum(leaf.nbytes for leaf in leaves) == ROWS * LENGTH * kv_cache.position_bytes(CONFIG, dtype)


@pytest.mark.parametrize(
    ("kind", "mesh", "part"), [("bfloat16", None, 0.5), ("int8", None, 0.4), ("int8", "data=2,fsdp=2,tensor=2", 0.4)]
)
def test_a_model_whose_cache_has_fewer_bits(tiny, kind, mesh, part):
    """The first token is exact; later ones are of a model whose keys and values are nearly the same."""
    whole, small = lmm_jax.load(tiny("tiny")), lmm_jax.load(tiny("tiny"), kv_cache=kind, mesh=mesh)
    prompts = [np.random.default_rng(i).integers(3, 200, 9 + 7 * i) for i in range(5)]
    requests = [Request(ids, (), Sampling(6)) for ids in prompts]
    replies = small.engine.generate(requests, ())
    assert [len(reply) for reply in replies] == [6] * 5
    rows = [Row(np.concatenate([ids, reply]), ()) for ids, reply in zip(prompts, replies)]
    logits, _ = whole.engine.logits(rows, [()] * 5)
    for row, ids, reply in zip(logits, prompts, replies):
        said = row[len(ids) - 1 :][: len(reply)]
        best, chosen = said.max(-1), said[np.arange(len(reply)), reply]
        assert chosen[0] == pytest.approx(best[0], abs=1e-4)
        assert (best - chosen <= 0.02 * said.std(-1)).all()  # where another word is chosen, it is as likely
    caches = [kv_cache.position_bytes(whole.config.decoder, m.engine.programs.cache_dtype) for m in (whole, small)]
    assert caches[1] <= part * caches[0]


def test_an_unknown_kind(tiny):
    with pytest.raises(UserError, match="int8"):
        lmm_jax.load(tiny("tiny"), kv_cache="int2")

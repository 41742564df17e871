"""Memory that programs take beside their inputs and outputs, read off compiled programs; nothing is allocated."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lmm_jax.config import named_sizes
from lmm_jax.models import kv_cache
from lmm_jax.models.attention import attend
from lmm_jax.models.llava_mini import LlavaMini, abstract_params
from lmm_jax.sharding import make_mesh

LENGTHS = (2560, 5120, 10240)
GIB = 2**30


def temporaries(program, *arguments) -> int:
    """Bytes."""
    return jax.jit(program).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def attention(length: int, implementation: str, gradient: bool) -> int:
    """Of causal attention with the heads of LLaMA-3.1-8B."""
    q, k, v = (jax.ShapeDtypeStruct((1, length, heads, 128), jnp.float32) for heads in (32, 8, 8))

    def forward(*x):
        return attend(*x, causal=True, implementation=implementation)

    if gradient:
        return temporaries(jax.grad(lambda *x: forward(*x).sum(), (0, 1, 2)), q, k, v)
    return temporaries(forward, q, k, v)


@pytest.mark.parametrize("gradient", (False, True), ids=("forward", "gradient"))
def test_attention_grows_with_the_length(gradient):
    sizes = [attention(n, "auto", gradient) for n in LENGTHS]
    assert all(1.9 < b / a < 2.1 for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("gradient", (False, True), ids=("forward", "gradient"))
def test_plain_attention_grows_with_its_square(gradient):
    """So the test above can fail."""
    small, large = (attention(n, "plain", gradient) for n in LENGTHS[1:])
    assert large / small > 3.9


def prefill(length: int) -> int:
    """Of a prompt, 8B sizes in float32 with two layers: the scanned kind and the last."""
    config = named_sizes()["llava-mini-llama-3.1-8b"]
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=2))
    model = LlavaMini(config, jnp.float32)

    def program(params, x, last):
        cache = kv_cache.empty(config.decoder, 1, length + 64, jnp.float32)
        return model.apply({"params": params}, x, cache=cache, queries=last[:, None], method="decode")

    x = jax.ShapeDtypeStruct((1, length, config.decoder.hidden_size), jnp.float32)
    return temporaries(program, abstract_params(config, make_mesh()), x, jax.ShapeDtypeStruct((1,), jnp.int32))


def test_prefill_of_ten_thousand_vision_tokens():
    """2 GiB: the MLP's hidden layer is 0.55 GiB twice; the scores of one layer alone would be 12.5 GiB."""
    sizes = [prefill(n) for n in LENGTHS]
    assert sizes[-1] < 2 * GIB
    assert all(1.9 < b / a < 2.1 for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("kept", (jnp.float32, jnp.int8))
def test_decode_step_converts_a_layer_at_a_time(kept):
    """Of nine layers at most one lies in memory in float32 beside the cache."""
    config = named_sizes()["tiny"]
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=9))
    model = LlavaMini(config, jnp.float32)
    cache = jax.eval_shape(lambda: kv_cache.empty(config.decoder, 4, 4096, kept))
    x = jax.ShapeDtypeStruct((4, 1, config.decoder.hidden_size), jnp.float32)

    def program(params, x, cache, at):
        return model.apply({"params": params}, x, cache=cache, write_at=at, method="decode")

    arguments = abstract_params(config, make_mesh()), x, cache, jax.ShapeDtypeStruct((4,), jnp.int32)
    taken = jax.jit(program, donate_argnums=2).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert taken < 1.2 * 4 * 4096 * kv_cache.position_bytes(config.decoder, jnp.float32) / 9

"""Modality pre-fusion (paper section 4.3, spec section 4), split where causality splits it.

    image side   [ features … | C² compressed tokens ]      needs nothing of the question
    text side                                          [ T instruction tokens ]   reads the image's keys and values

Axis letters: N images, S prefix length, V = C² vision tokens, T text tokens, D width, K key/value heads, H their channels.
Both run the same decoder layers. In the last one the image features are needed as keys and values only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmm_jax.config import DecoderConfig
from lmm_jax.models import layers
from lmm_jax.models.llama import KV, LayerStack, Step


def fuse_image(
    stack: LayerStack, x: jax.Array, num_tokens: int, config: DecoderConfig, implementation: str
) -> tuple[dict[str, KV], jax.Array]:
    """x (N,S,D), the last `num_tokens` of it compressed tokens -> keys and values per layer, fused tokens (N,V,D)."""
    length = x.shape[1]
    table = _rope(jnp.arange(length), config)
    queries = jnp.broadcast_to(jnp.arange(length - num_tokens, length), (x.shape[0], num_tokens))
    tokens, prefix, _ = stack(x, Step(table, queries=queries, keep=True, implementation=implementation))
    return prefix, tokens


def fuse_text(
    stack: LayerStack, text: jax.Array, prefix: dict[str, KV], config: DecoderConfig, implementation: str
) -> jax.Array:
    """text (R,T,D), the visible instruction tokens of each image's row, padded right -> fused text (R,T,D).

    R is N, or a multiple: then R/N rows in turn are about the same image.
    """
    start = prefix["last"][0].shape[1]
    table = _rope(start + jnp.arange(text.shape[1]), config)
    return stack(text, Step(table, implementation=implementation), prefix=prefix)[0]


def _rope(positions: jax.Array, c: DecoderConfig) -> KV:
    return layers.rotary_table(positions, layers.rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))

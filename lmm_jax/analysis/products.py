"""The matrix products of a model, component by component (spec sections 1-5).

A product of (m,k) and (k,n) counts 2·m·k·n FLOPs. Attention counts over all pairs of positions, as is usual.

Axis letters: N images, P tiles, G patch grid side, S features of an image, V = C² vision tokens of an image, T positions,
D and Dv widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lmm_jax.config import CompressorConfig, DecoderConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Product:
    """Products with the kernel at a path of the parameter tree, or of two activations (attention's own) where that is ""."""

    kernel: str
    flops: float


def flops(products: Iterable[Product], *, attention: bool = True) -> float:
    """Sum; without `attention`, of products with kernels only, as is usual in papers."""
    return sum(p.flops for p in products if p.kernel or attention)


def patches(c: VisionConfig, pictures: int) -> list[Product]:
    """The patch embedding of (N·P) pictures."""
    each = 2.0 * c.grid**2 * 3 * c.patch_size**2 * c.hidden_size
    return [Product("vision_tower/embeddings/patch_embedding/kernel", pictures * each)]


def encoder(c: VisionConfig, pictures: int, *, layers: int) -> list[Product]:
    """Encoder layers over (N·P) pictures of G² patches and a class token."""
    tokens, width, path = c.grid**2 + 1, c.hidden_size, "vision_tower/layers/stack"
    x = 2.0 * pictures * layers * tokens * width
    return [
        *(Product(f"{path}/self_attn/{name}_proj/kernel", x * width) for name in ("q", "k", "v", "out")),
        Product("", 2 * x * tokens),
        *(Product(f"{path}/mlp/{name}/kernel", x * c.intermediate_size) for name in ("fc1", "fc2")),
    ]


def compressor(c: CompressorConfig, width: int, images: int, features: int, *, published: bool = False) -> list[Product]:
    """C² queries over S features of each image: keys and values of all features as published, or on the queries' side."""
    path, tokens = "compressor/attn", c.num_queries
    once, each = 2.0 * tokens * width**2, 2.0 * tokens * images * width**2  # the queries are the same for all images
    keys, values = (2.0 * images * features * width**2,) * 2 if published else (once, each)
    return [
        Product(f"{path}/q_proj/kernel", once),
        Product(f"{path}/k_proj/kernel", keys),
        Product(f"{path}/v_proj/kernel", values),
        Product("", 4.0 * images * tokens * features * width * (1 if published else c.num_heads)),
        Product(f"{path}/out_proj/kernel", each),
    ]


def projector(v: int, d: int, tokens: int) -> list[Product]:
    """Two layers, Dv to D to D."""
    return [
        Product("mm_projector/linear_1/kernel", 2.0 * tokens * v * d),
        Product("mm_projector/linear_2/kernel", 2.0 * tokens * d * d),
    ]


def decoder(path: str, c: DecoderConfig, layers: int, *, rows: int, tokens: int, last: int, keys: int) -> list[Product]:
    """Decoder layers, at `path` of the tree, over rows of T = `tokens` new positions that see `keys` positions each.

    The last layer runs for `last` of the positions only; its keys and values are of all.
    """
    found = []
    for name, number, queries in (("stack", layers - 1, tokens), ("last", 1, last)):
        found += _decoder_layers(f"{path}/{name}", c, rows * number, tokens, queries, keys) if number else []
    return found


def _decoder_layers(path: str, c: DecoderConfig, rows: int, tokens: int, queries: int, keys: int) -> list[Product]:
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    x = 2.0 * rows * c.hidden_size
    return [
        Product(f"{path}/self_attn/q_proj/kernel", x * queries * q),
        Product(f"{path}/self_attn/k_proj/kernel", x * tokens * kv),
        Product(f"{path}/self_attn/v_proj/kernel", x * tokens * kv),
        Product("", 4.0 * rows * queries * keys * q),
        Product(f"{path}/self_attn/o_proj/kernel", x * queries * q),
        *(Product(f"{path}/mlp/{name}_proj/kernel", x * queries * c.intermediate_size) for name in ("gate", "up", "down")),
    ]


def head(c: DecoderConfig, positions: int) -> list[Product]:
    """Logits of so many positions."""
    table = "embed_tokens/embedding" if c.tie_word_embeddings else "lm_head/kernel"
    return [Product(table, 2.0 * positions * c.hidden_size * c.vocab_size)]

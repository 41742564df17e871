"""Keys and values that the decoder keeps: how they lie, how new ones are written, how a decode step reads them.

    float  keys (B,K,S,H), values (B,K,S,H)                  bfloat16 on a processor: their bits, uint16
    int8   of each: values (B,K,S,H) int8, scale (B,K,S)     the largest of a position's H channels over 127

A decode step reads int8 as it is: a key's scale goes onto its score, a value's onto its weight. Of a cache of many layers, at
most one layer at a time lies in memory in another form. Of stacked layers the layer axis comes first.

Axis letters: B rows, T new tokens, S positions, N heads, K key/value heads (N is a multiple of K), H channels of a head,
L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from lmm_jax.config import DecoderConfig
from lmm_jax.sharding import constrain, platform

Half = jax.Array | Mapping[str, jax.Array]  # keys, or values
Cache = tuple[Half, Half]

STACK_AXES = ("layers", "batch", "kv_heads", None, None)  # of any leaf of stacked layers, as many as it has
LAYER_AXES = STACK_AXES[1:]
BLOCK = 64  # positions that a decode step on a processor takes together
_UNSEEN = jnp.finfo(jnp.float32).min  # score of a key that a row does not see


def empty(config: DecoderConfig, rows: int, length: int, dtype: Any, *, apart: bool = False) -> dict[str, Cache]:
    """A cache of zeros for so many rows of so many positions; dtype float or int8.

    It is {"stack": …} of all L layers or, where the layers lie `apart` (see there), one of each: {"0": …, "1": …, …}.
    """
    shape = (rows, config.num_kv_heads, length, config.head_dim)

    def half(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Half:
        def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return constrain(jnp.zeros(shape, dtype), *axes[: len(shape)])

        if jnp.dtype(dtype) != jnp.int8:
            # there XLA turns whole arrays of bfloat16 into float32 and back for each part it takes or writes
            return zeros(shape, jnp.uint16 if jnp.dtype(dtype) == jnp.bfloat16 and platform() == "cpu" else dtype)
        return {"values": zeros(shape, jnp.int8), "scale": zeros(shape[:-1], jnp.float32)}

    if apart:
        return {str(i): (half(shape, LAYER_AXES), half(shape, LAYER_AXES)) for i in range(config.num_layers)}
    stacked = (config.num_layers, *shape)
    return {"stack": (half(stacked, STACK_AXES), half(stacked, STACK_AXES))}


def position_bytes(config: DecoderConfig, dtype: Any) -> int:
    """Bytes of one position of one row, all layers."""
    dtype = jnp.dtype(dtype)
    each = config.head_dim * dtype.itemsize + (4 if dtype == jnp.int8 else 0)
    return 2 * config.num_layers * config.num_kv_heads * each


def write(
    cache: Cache, new: tuple[jax.Array, jax.Array], layer: jax.Array | None = None, at: jax.Array | None = None
) -> Cache:
    """New keys and values (B,T,K,H) at the start of the cache, or one token's (B,1,K,H) at position `at` (B,).

    `layer` () int32 says which of stacked layers. What lies outside is dropped: a row that is done may write past its end.
    """
    entering = tuple(_as_kept(n.swapaxes(1, 2), c) for c, n in zip(cache, new))
    if at is None:
        first = () if layer is None else (layer,)

        def put(c: jax.Array, n: jax.Array) -> jax.Array:
            n = n if layer is None else n[None]
            return jax.lax.dynamic_update_slice(c, n, (*first, *[0] * (c.ndim - len(first))))

        return jax.tree.map(put, cache, entering)
    rows = jnp.arange(len(at))
    where = (rows, slice(None), at) if layer is None else (layer, rows, slice(None), at)
    return jax.tree.map(lambda c, n: c.at[where].set(n[:, :, 0], mode="drop"), cache, entering)


def attend(q: jax.Array, cache: Cache, position: jax.Array, layer: jax.Array | None = None) -> jax.Array:
    """A decode step: one query per row against its cache.

    Args:
      q: (B,1,N,H).
      cache: of one layer, or of stacked ones.
      position: (B,) int32; row b sees the keys up to position[b].
      layer: () int32, which of stacked layers.

    Returns:
      (B,1,N,H), dtype of q.
    """
    keys = cache[0]["values"] if isinstance(cache[0], Mapping) else cache[0]
    heads, length = keys.shape[-3:-1]
    grouped = rearrange(q[:, 0], "b (k g) h -> b k g h", k=heads)
    in_blocks = platform() == "cpu" and length > BLOCK
    out = (_in_blocks if in_blocks else _at_once)(grouped, cache, position, layer)
    return rearrange(out, "b k g h -> b 1 (k g) h").astype(q.dtype)


def _at_once(q: jax.Array, cache: Cache, position: jax.Array, layer: jax.Array | None) -> jax.Array:
    """q (B,K,G,H) against all positions; row b's weights are 0 past position[b]."""
    keys, values = cache if layer is None else jax.tree.map(lambda c: c[layer], cache)
    scores = _scores(q, keys, position, 0, 0)
    return _mix(jax.nn.softmax(scores, axis=-1), values, q.dtype)


def _in_blocks(q: jax.Array, cache: Cache, position: jax.Array, layer: jax.Array | None) -> jax.Array:
    """As `_at_once`, for one row after the other, each as far as it goes.

    A processor copies all that it takes of a cache: so it is little at a time, and nothing that no row sees.
    """
    rows, length = len(q), jax.tree.leaves(cache)[0].shape[2 if layer is None else 3]
    few = rows if jax.sharding.get_abstract_mesh().size > 1 else 1  # rows that lie on several devices go together

    def part(c: jax.Array, first: jax.Array, block: jax.Array) -> jax.Array:
        c = c if layer is None else c[layer]
        c = jax.lax.dynamic_slice_in_dim(c, first, few)
        return jax.lax.dynamic_slice_in_dim(c, block * BLOCK, BLOCK, axis=2)  # the last one ends where the cache does

    def attend_few(first: jax.Array) -> jax.Array:
        mine, seen = (jax.lax.dynamic_slice_in_dim(x, first, few) for x in (q, position))

        def one(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, out = carry
            keys, values = jax.tree.map(lambda c: part(c, first, block), cache)
            begin = block * BLOCK
            scores = _scores(mine, keys, seen, jnp.minimum(begin, length - BLOCK), begin)
            top = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
            before, weights = jnp.exp(largest - top), jnp.exp(scores - top)
            total = total * before + weights.sum(axis=-1, keepdims=True)
            return top, total, out * before + _mix(weights, values, q.dtype)

        begin = jnp.full((*mine.shape[:-1], 1), _UNSEEN), jnp.zeros((*mine.shape[:-1], 1)), jnp.zeros(mine.shape)
        _, total, out = jax.lax.fori_loop(0, seen.max() // BLOCK + 1, one, begin)
        return out / total

    return rearrange(jax.lax.map(attend_few, jnp.arange(0, rows, few)), "n few k g h -> (n few) k g h")


def _scores(q: jax.Array, keys: Half, position: jax.Array, first: jax.Array | int, begin: jax.Array | int) -> jax.Array:
    """q (B,K,G,H) against the keys of the positions from `first` on, seen from `begin` to `position` -> (B,K,G,S) float32."""
    k, scale = _parts(keys)
    scores = jnp.einsum("bkgh,bksh->bkgs", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5 if scale is None else scores * (q.shape[-1] ** -0.5 * scale[:, :, None])
    at = first + jnp.arange(k.shape[2])
    seen = (begin <= at) & (at <= position[:, None, None, None])
    return jnp.where(seen, scores, _UNSEEN)


def _mix(weights: jax.Array, values: Half, dtype: Any) -> jax.Array:
    """Weights (B,K,G,S) float32 of the values -> (B,K,G,H) float32; multiplied in dtype."""
    v, scale = _parts(values)
    weights = weights if scale is None else weights * scale[:, :, None]
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32)


def _parts(half: Half) -> tuple[jax.Array, jax.Array | None]:
    """Keys or values and, where there is one, their scale."""
    if isinstance(half, Mapping):
        return half["values"], half["scale"]
    return (jax.lax.bitcast_convert_type(half, jnp.bfloat16) if half.dtype == jnp.uint16 else half), None


def _as_kept(new: jax.Array, kept: Half) -> Half:
    """Keys or values (…,H) in the form of the cache."""
    if not isinstance(kept, Mapping):
        is_bits = kept.dtype == jnp.uint16
        return jax.lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16) if is_bits else new.astype(kept.dtype)
    new = new.astype(jnp.float32)
    scale = jnp.max(jnp.abs(new), axis=-1) / 127
    values = jnp.round(new / jnp.where(scale > 0, scale, 1)[..., None])
    return {"values": values.astype(jnp.int8), "scale": scale}

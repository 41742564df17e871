"""LLaMA decoder layers, and the stack that scans them.

Axis letters: B batch (of rows, or of images in pre-fusion), T new tokens, S key positions, Q selected queries, D width,
N heads, K key/value heads, H channels of a head, L layers.

A stack of n layers is `stack`, n−1 layers scanned with stacked parameters, and `last`, which stands alone because it often
has less to do: whoever needs only some positions of the result runs the last layer for those queries alone.
State per layer (key/value cache, image prefix) has the same form: {"stack": …(n−1 on axis 0), "last": …}.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from lmm_jax.config import DecoderConfig
from lmm_jax.models import layers
from lmm_jax.models.attention import attend, attend_cached
from lmm_jax.sharding import constrain

KV = tuple[jax.Array, jax.Array]  # keys and values, each (B,S,K,H); of a cache (B,K,S,H), as decoding reads it


@struct.dataclass
class Step:
    """What all layers of one pass share.

    Attributes:
      rope: cosines and sines, (T,H/2) or (B,T,H/2) each.
      write_at: None, or the cache position (B,) of the one new token of each row: a decode step.
      queries: None, or (B,Q), ascending: the positions (in x) that the last layer is run for.
      mask: None, or (B,T,T) bool, which keys each position sees; without it those before it, and itself.
      keep: whether each layer's new keys and values are returned.
      implementation: attention kernel.
    """

    rope: KV
    write_at: jax.Array | None = None
    queries: jax.Array | None = None
    mask: jax.Array | None = None
    keep: bool = struct.field(pytree_node=False, default=False)
    implementation: str = struct.field(pytree_node=False, default="auto")


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding; keys may continue a prefix or a cache."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the four projections."""
        c = self.config
        self.q_proj = layers.Proj((c.hidden_size,), (c.num_heads, c.head_dim))
        self.k_proj = layers.Proj((c.hidden_size,), (c.num_kv_heads, c.head_dim))
        self.v_proj = layers.Proj((c.hidden_size,), (c.num_kv_heads, c.head_dim))
        self.o_proj = layers.Proj((c.num_heads, c.head_dim), (c.hidden_size,), gain=layers.residual_gain(c.num_layers))

    def __call__(
        self, x: jax.Array, prefix: KV | None, cache: KV | None, layer: jax.Array | None, step: Step
    ) -> tuple[jax.Array, KV, KV | None]:
        """x (B,T,D) -> output (B,T or Q,D), this call's keys and values (B,T,K,H), the updated cache.

        Args:
          x: normalised input.
          prefix: keys and values before x, visible to all of it.
          cache: (B,K,S,H) twice, or (L,B,K,S,H) twice with `layer` () int32 saying which.
          layer: index into a stacked cache.
          step: what all layers share.
        """
        selected, rope = x, step.rope
        if step.queries is not None:
            selected = jnp.take_along_axis(x, step.queries[..., None], axis=1)
            rope = tuple(t[step.queries] for t in rope)
        q = layers.rotate(self.q_proj(selected), rope)
        k, v = layers.rotate(self.k_proj(x), step.rope), self.v_proj(x)
        q = constrain(q, "batch", None, "heads", None)
        k, v = (constrain(t, "batch", None, "kv_heads", None) for t in (k, v))
        new, mask, causal = (k, v), step.mask, step.mask is None
        if cache is not None:
            cache = _write(cache, new, layer, step.write_at)
        if step.write_at is not None:
            k, v = cache if layer is None else (t[layer] for t in cache)
            return self.o_proj(attend_cached(q, k, v, step.write_at)), new, cache
        if step.queries is not None:
            mask, causal = jnp.arange(x.shape[1]) <= step.queries[..., None], False
        elif prefix is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(prefix, new))
        out = attend(q, k, v, causal=causal, mask=mask, implementation=step.implementation)
        return self.o_proj(out), new, cache


def _write(cache: KV, new: KV, layer: jax.Array | None, write_at: jax.Array | None) -> KV:
    """New keys and values (B,T,K,H) at the start of the cache, or one token (B,1,K,H) at `write_at` (B,)."""
    new = tuple(n.astype(c.dtype).swapaxes(1, 2) for c, n in zip(cache, new))
    if write_at is None:
        start = (0,) * 4 if layer is None else (layer, 0, 0, 0, 0)
        return tuple(jax.lax.dynamic_update_slice(c, n if layer is None else n[None], start) for c, n in zip(cache, new))
    rows = jnp.arange(len(write_at))
    where = (rows, slice(None), write_at) if layer is None else (layer, rows, slice(None), write_at)
    return tuple(_scatter(c, where, n[:, :, 0]) for c, n in zip(cache, new))


def _scatter(cache: jax.Array, where: tuple, new: jax.Array) -> jax.Array:
    """cache[where] = new, in place; what lies outside is dropped: a row that is done may write past its end."""
    if cache.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # XLA has no such scatter there and would convert the whole cache to float32 and back: move bits instead
        bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (cache, new))
        return jax.lax.bitcast_convert_type(_scatter(next(bits), where, next(bits)), jnp.bfloat16)
    return cache.at[where].set(new, mode="drop")


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the sub-layers."""
        c = self.config
        self.input_layernorm = layers.RMSNorm(c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = layers.RMSNorm(c.rms_norm_eps)
        self.mlp = layers.SwiGLU(c.hidden_size, c.intermediate_size, layers.residual_gain(c.num_layers))

    def __call__(self, carry: tuple, inputs: tuple, step: Step) -> tuple[tuple, KV | None]:
        """(x (B,T,D), cache), (layer index, prefix) -> ((x (B,T or Q,D), cache), keys and values if step.keep)."""
        (x, cache), (layer, prefix) = carry, inputs
        out, new, cache = self.self_attn(self.input_layernorm(x), prefix, cache, layer, step)
        if step.queries is not None:
            x = jnp.take_along_axis(x, step.queries[..., None], axis=1)
        x = constrain(x + out, "batch", None, None)
        x = constrain(x + self.mlp(self.post_attention_layernorm(x)), "batch", None, None)
        return (x, cache), (new if step.keep else None)


class LayerStack(nn.Module):
    """`length` decoder layers: `stack` scanned, `last` alone."""

    config: DecoderConfig
    length: int
    remat: str = "none"

    def setup(self) -> None:
        """Declares the layers."""
        layer = layers.rematerialised(DecoderLayer, self.remat)
        if self.length > 1:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=self.length - 1,
            )
            self.stack = scanned(self.config)
        self.last = layer(self.config)

    def __call__(
        self, x: jax.Array, step: Step, *, prefix: dict[str, KV] | None = None, cache: dict[str, KV] | None = None
    ) -> tuple[jax.Array, dict[str, KV | None], dict[str, KV] | None]:
        """Runs all layers; `step.queries` applies to the last one only.

        Args:
          x: (B,T,D).
          step: what all layers share.
          prefix: keys and values that come before x, per layer.
          cache: keys and values to write to (and, in a decode step, to read from), per layer.

        Returns:
          x (B,T,D) or (B,Q,D); the new keys and values per layer if `step.keep`; the updated cache.
        """
        prefix, cache = prefix or {}, dict(cache or {})
        kept: dict[str, Any] = {}
        if self.length > 1:
            inputs = (jnp.arange(self.length - 1), prefix.get("stack"))
            (x, cache["stack"]), kept["stack"] = self.stack((x, cache.get("stack")), inputs, step.replace(queries=None))
        (x, cache["last"]), kept["last"] = self.last((x, cache.get("last")), (None, prefix.get("last")), step)
        return x, kept, cache


def empty_cache(config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype) -> dict[str, KV]:
    """Zeroed keys and values for `batch` rows of `length` positions: (L−1,B,K,S,H) twice and (B,K,S,H) twice."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    last = tuple(constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None) for _ in range(2))
    if config.num_layers == 1:
        return {"last": last}
    shape = (config.num_layers - 1, *shape)
    stack = tuple(constrain(jnp.zeros(shape, dtype), "layers", "batch", "kv_heads", None, None) for _ in range(2))
    return {"stack": stack, "last": last}

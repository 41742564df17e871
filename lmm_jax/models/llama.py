"""LLaMA decoder layers, and the stack that scans them.

Axis letters: B batch (of rows, or of images in pre-fusion), T new tokens, S key positions, Q selected queries, D width,
N heads, K key/value heads, H channels of a head, L layers.

A stack of n layers is `stack`, n−1 layers scanned with stacked parameters, and `last`, which stands alone because it often
has less to do: whoever needs only some positions of the result runs the last layer for those queries alone.
An image's prefix has the same form: {"stack": …(n−1 on axis 0), "last": …}; a cache has all layers on axis 0 (see `kv_cache`).
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from lmm_jax.config import DecoderConfig
from lmm_jax.models import apart, kv_cache, layers
from lmm_jax.models.attention import attend
from lmm_jax.models.kv_cache import Cache
from lmm_jax.sharding import constrain

KV = tuple[jax.Array, jax.Array]  # keys and values, each (B,S,K,H)


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
        self, x: jax.Array, prefix: KV | None, cache: Cache | None, layer: jax.Array | None, step: Step
    ) -> tuple[jax.Array, KV, Cache | None]:
        """x (B,T,D) -> output (B,T or Q,D), this call's keys and values (B,T,K,H), the updated cache.

        Args:
          x: normalised input.
          prefix: keys and values (…,S,K,H) before x, visible to all of it: of B rows, or of a part of B, where rows in turn
            share one.
          cache: see `kv_cache`; of stacked layers `layer` () int32 says which.
          layer: index into a stacked cache.
          step: what all layers share.
        """
        selected, rope = x, step.rope
        if step.queries is not None:
            selected = jnp.take_along_axis(x, step.queries[..., None], axis=1)
            rope = tuple(t[step.queries] for t in rope)
        q = layers.rotate(self.q_proj(selected), rope)
        k, v = layers.rotate(self.k_proj(x), step.rope), self.v_proj(x)
        q = checkpoint_name(constrain(q, "batch", None, "heads", None), layers.NARROW)
        k, v = (checkpoint_name(constrain(t, "batch", None, "kv_heads", None), layers.NARROW) for t in (k, v))
        new, mask, causal = (k, v), step.mask, step.mask is None
        if cache is not None:
            cache = kv_cache.write(cache, new, layer, step.write_at)
        if step.write_at is not None:
            return self.o_proj(kv_cache.attend(q, cache, step.write_at, layer)), new, cache
        if step.queries is not None:
            mask, causal = jnp.arange(x.shape[1]) <= step.queries[..., None], False
        elif prefix is not None:
            each = len(x) // len(prefix[0])
            k, v = (jnp.concatenate([jnp.repeat(old, each, axis=0), own], axis=1) for old, own in zip(prefix, new))
        out = attend(q, k, v, causal=causal, mask=mask, implementation=step.implementation)
        return checkpoint_name(self.o_proj(out), layers.NARROW), new, cache


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
                check_constancy_invariants=False,  # that traces a layer twice
            )
            self.stack = scanned(self.config)
        self.last = layer(self.config)

    def __call__(
        self, x: jax.Array, step: Step, *, prefix: dict[str, KV] | None = None, cache: dict[str, Cache] | None = None
    ) -> tuple[jax.Array, dict[str, KV | None], dict[str, Cache] | None]:
        """Runs all layers; `step.queries` applies to the last one only.

        Args:
          x: (B,T,D).
          step: what all layers share.
          prefix: keys and values that come before x, per layer.
          cache: keys and values to write to (and, in a decode step, to read from), per layer.

        Returns:
          x (B,T,D) or (B,Q,D); the new keys and values per layer if `step.keep`; the updated cache.
        """
        prefix, cache, last = prefix or {}, dict(cache or {}), self.length - 1
        kept: dict[str, Any] = {}
        params = self.variables.get("params", {}).get("stack")
        if apart.is_apart(params):
            return self._run_apart(params, x, step, prefix, cache)
        if apart.is_whole(params, self.length):
            return self._run_whole(params, x, step, prefix, cache)
        if last:
            inputs = (jnp.arange(last), prefix.get("stack"))
            (x, cache["stack"]), kept["stack"] = self.stack((x, cache.get("stack")), inputs, step.replace(queries=None))
        (x, cache["stack"]), kept["last"] = self.last((x, cache.get("stack")), (last, prefix.get("last")), step)
        return x, kept, cache

    def _run_apart(
        self, params: Any, x: jax.Array, step: Step, prefix: dict[str, KV], cache: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
        """As `__call__`, one layer after the other."""
        # without a barrier XLA computes the table in every layer again, for each head
        step, last = step.replace(rope=jax.lax.optimization_barrier(step.rope)), self.length - 1
        inner, kept = step.replace(queries=None), []
        for i in range(last):
            one, inputs = apart.layer(params, i), (None, jax.tree.map(operator.itemgetter(i), prefix.get("stack")))
            (x, cache[str(i)]), new = self._alone(one, (x, cache.get(str(i))), inputs, inner)
            kept.append(new)
        (x, cache[str(last)]), new = self.last((x, cache.get(str(last))), (None, prefix.get("last")), step)
        return x, {"stack": jax.tree.map(lambda *of: jnp.stack(of), *kept), "last": new}, cache

    def _run_whole(
        self, params: Any, x: jax.Array, step: Step, prefix: dict[str, KV], cache: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
        """As `__call__`; where the last layer has no less to do than the others, it is scanned with them."""

        def one(carry: tuple, inputs: tuple) -> tuple[tuple, KV | None]:
            return self._alone(apart.layer(params, inputs[0]), carry, inputs, step.replace(queries=None))

        def run(count: int, prefix: KV | None) -> tuple[tuple, KV | None]:
            return jax.lax.scan(one, (x, cache.get("stack")), (jnp.arange(count), prefix))

        if step.queries is None and not step.keep:
            if prefix:
                prefix = jax.tree.map(lambda s, one: jnp.concatenate([s, one[None]]), prefix["stack"], prefix["last"])
            (x, cache["stack"]), _ = run(self.length, prefix or None)
            return x, {}, cache
        last = self.length - 1
        (x, cache["stack"]), kept = run(last, prefix.get("stack"))
        (x, cache["stack"]), new = self.last((x, cache.get("stack")), (last, prefix.get("last")), step)
        return x, {"stack": kept, "last": new}, cache

    def _alone(self, params: Any, carry: tuple, inputs: tuple, step: Step) -> tuple[tuple, KV | None]:
        """One layer with parameters of its own."""
        return DecoderLayer(self.config, parent=None).apply({"params": params}, carry, inputs, step)

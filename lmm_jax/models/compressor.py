"""Query-based compression: C² learned queries read the vision features of an image (paper section 4.2, spec section 2).

Axis letters: N images, S = (n·G)² features on a square grid, C compression side, Dv vision width, A heads, H their channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lmm_jax.config import CompressorConfig
from lmm_jax.models.layers import LayerNorm, Proj


def sincos_2d(size: int, width: int) -> np.ndarray:
    """Fixed positions of a size×size grid: (size², width) float32; columns in the first half of the channels, then rows."""
    frequency = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    angle = np.arange(size)[:, None] * frequency
    one = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # (size, width/2)
    columns = np.broadcast_to(one[None, :], (size, size, width // 2))
    rows = np.broadcast_to(one[:, None], (size, size, width // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(size**2, width).astype(np.float32)


def bicubic_weights(source: int, target: int) -> np.ndarray:
    """Interpolation matrix (target, source) float32 of torch's bicubic: coefficient −0.75, half pixels, edges clamped."""
    a = -0.75
    weights = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - tap)
            if d <= 1:
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                w = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, np.clip(tap, 0, source - 1)] += w
    return weights.astype(np.float32)


class CrossAttention(nn.Module):
    """Biased multi-head attention whose weights are of interest."""

    width: int
    num_heads: int

    def setup(self) -> None:
        """Declares the four projections."""
        heads = (self.num_heads, self.width // self.num_heads)
        self.q_proj = Proj((self.width,), heads, bias=True)
        self.k_proj = Proj((self.width,), heads, bias=True)
        self.v_proj = Proj((self.width,), heads, bias=True)
        self.out_proj = Proj(heads, (self.width,), bias=True)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q (C²,Dv), k and v (N,S,Dv) -> output (N,C²,Dv), weights averaged over heads (N,C²,S) float32.

        Few queries meet many features, so both projections of the features are done on the queries' side: (x·W)·q = x·(W·q)
        for keys, whose bias adds the same to all scores of a query and so nothing, and Σ w·(x·W) = (Σ w·x)·W for values.
        """
        q = self.q_proj(q)
        queries = jnp.einsum("cah,dah->cad", q, self.k_proj.kernel.astype(q.dtype))
        scores = jnp.einsum("cad,nsd->nacs", queries, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1)
        seen = jnp.einsum("nacs,nsd->ncad", weights.astype(v.dtype), v)
        out = jnp.einsum("ncad,dah->ncah", seen, self.v_proj.kernel.astype(v.dtype)) + self.v_proj.offset.astype(v.dtype)
        return self.out_proj(out), weights.mean(axis=1)


class Compressor(nn.Module):
    """Compresses S features to C² tokens."""

    config: CompressorConfig
    width: int

    def setup(self) -> None:
        """Declares queries, positions, norms and attention."""
        c, shape = self.config, (self.config.num_queries, self.width)
        self.query = self.param("query", nn.initializers.normal(0.02), shape, jnp.float32)
        self.pos_embed = self.param("pos_embed", lambda _, s, t: jnp.asarray(sincos_2d(c.size, s[1]), t), shape, jnp.float32)
        self.ln_q = LayerNorm(c.layer_norm_eps)
        self.ln_kv = LayerNorm(c.layer_norm_eps)
        self.attn = CrossAttention(self.width, c.num_heads)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x (N,S,Dv) -> tokens (N,C²,Dv), compression map (N,C²,S) float32: where each token looked, rows sum to 1."""
        position = jax.lax.stop_gradient(self.pos_embed.astype(jnp.float32))  # a constant stored with the weights
        q = self.ln_q(self.query.astype(x.dtype)) + position.astype(x.dtype)
        v = self.ln_kv(x)
        k = v + self._positions_of(position, round(x.shape[1] ** 0.5)).astype(x.dtype)
        return self.attn(q, k, v)

    def _positions_of(self, position: jax.Array, grid: int) -> jax.Array:
        """(C²,Dv) resized to the feature grid: (grid²,Dv)."""
        c = self.config.size
        w = bicubic_weights(c, grid)
        resized = jnp.einsum("ir,jc,rcd->ijd", w, w, position.reshape(c, c, -1), precision="highest")
        return resized.reshape(grid * grid, -1)

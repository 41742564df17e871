"""The small parts every layer is made of: projection, norms, rotary embedding, SwiGLU.

Axis letters: B batch, T tokens, D width, N heads, H channels of a head, F MLP width; `…` any leading axes.
Parameters may be stored in any float dtype; arithmetic runs in the dtype of the input, norms and rotary tables in float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lmm_jax.config import RopeScaling
from lmm_jax.models import apart, attention, quantization

NARROW = "narrow"  # name of a layer's projections that are no wider than the layer


def rematerialised(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """A layer whose backward pass computes again what it does not find.

    Args:
      layer: class of a layer.
      remat: what it finds, one of `config.REMAT`: everything; the layer's input only; that and the result of attention; that
        and the projections before and after attention; that and those of the MLP.
    """
    if remat == "none":
        return layer
    named, policies = jax.checkpoint_policies.save_only_these_names, jax.checkpoint_policies
    kept = {
        "full": None,
        "attention": named(attention.NAME),
        "narrow": named(attention.NAME, NARROW),
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named(attention.NAME)),
    }
    return nn.remat(layer, policy=kept[remat], prevent_cse=False)


class Proj(nn.Module):
    """y[…, out] = x[…, in] · kernel[in, out] (+ bias[out]); `in` and `out` may each be several axes.

    Every weight matrix of the model is one of these. Its kernel may be quantised, see `quantization`, or turned, see `apart`.
    Where the parameters hold `lora_a` (in, r), `lora_b` (r, out) and `lora_scale` (), the kernel is
    kernel + lora_scale · lora_a · lora_b.

    Attributes:
      inputs: sizes of the contracted axes, the last ones of x.
      outputs: sizes of the axes that replace them.
      bias: whether one is added.
      float32: whether y is float32 whatever x is, as logits are.
      gain: of a new kernel, whose deviation is gain · (number of inputs)^-½.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool = False
    float32: bool = False
    gain: float = 1.0

    def setup(self) -> None:
        """Declares kernel and bias."""
        init = nn.initializers.normal(self.gain * math.prod(self.inputs) ** -0.5)
        if self.has_variable("params", "kernel"):
            self.kernel = self.get_variable("params", "kernel")  # quantised ones have another shape
        else:
            self.kernel = self.param("kernel", init, (*self.inputs, *self.outputs), jnp.float32)
        if self.bias:
            self.offset = self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (…, *inputs) -> (…, *outputs), in the dtype of x, or float32."""
        dtype = jnp.float32 if self.float32 else None
        if apart.is_turned(self.kernel):
            y = apart.project(x, self.kernel, len(self.inputs), self.outputs, dtype)
        elif quantization.is_quantized(self.kernel):
            y = quantization.project(x, self.kernel, len(self.inputs), dtype)
        else:
            y = jnp.tensordot(x, self.kernel.astype(x.dtype), axes=len(self.inputs), preferred_element_type=dtype)
        if self.has_variable("params", "lora_a"):
            a, b, scale = (self.get_variable("params", f"lora_{part}").astype(x.dtype) for part in ("a", "b", "scale"))
            y += jnp.tensordot(jnp.tensordot(x, a, axes=len(self.inputs)) * scale, b, axes=1, preferred_element_type=dtype)
        return y + self.offset.astype(x.dtype) if self.bias else y


def residual_gain(layers: int) -> float:
    """Gain of what is added to the residual stream, so that `layers` layers of two such leave its scale as it is."""
    return (2 * layers) ** -0.5


class Embed(nn.Module):
    """A table of vectors: parameter `embedding` (rows, width)."""

    rows: int
    width: int

    def setup(self) -> None:
        """Declares the table."""
        self.embedding = self.param(
            "embedding", nn.initializers.normal(self.width**-0.5), (self.rows, self.width), jnp.float32
        )

    def __call__(self) -> jax.Array:
        """The whole table (rows, width)."""
        return self.embedding


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (…, D) -> (…, D), same dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / std · scale + bias over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (…, D) -> (…, D), same dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nn.Module):
    """LLaMA's MLP: down(silu(gate(x)) · up(x)); `gain` as of `Proj`, of the down projection."""

    width: int
    hidden: int
    gain: float = 1.0

    def setup(self) -> None:
        """Declares the three projections."""
        self.gate_proj = Proj((self.width,), (self.hidden,))
        self.up_proj = Proj((self.width,), (self.hidden,))
        self.down_proj = Proj((self.hidden,), (self.width,), gain=self.gain)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (…, D) -> (…, D)."""
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angle per position of each rotary pair: (H/2,) float32 (spec section 5; scaling as LLaMA-3.1)."""
    frequency = (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)
    if scaling is None:
        return frequency
    # Wavelengths beyond the original context are stretched by `factor`, short ones kept, those between blended.
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (frequency * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def rotary_table(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for positions (…, T): two arrays (…, T, H/2), float32."""
    angle = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies rotary embedding in the half-split form: x (B,T,N,H), table (T,H/2) or (B,T,H/2) twice -> (B,T,N,H)."""
    cos, sin = (t[..., None, :] for t in table)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

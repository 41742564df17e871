"""Weights in 8 or 4 bits; activations, keys and values stay as they are.

    int8    values (in…, out…) int8,  scale (out…)        y = (x · values) · scale
    int4    values (G, g, out…) int4, scale (G, out…)     y = Σ_G (x_G · values_G) · scale_G      G groups of g inputs

Scales are the largest magnitude over 127 or 7, so values are symmetric around 0. Of stacked layers the layer axis comes
first. What is quantised are the decoder's and the pre-fusion layers' projections and the head, which are nearly all there is;
the head, whose errors go straight to the words, keeps 8 bits in either case.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

GROUP = 128  # inputs that share a scale, at most
FEW = 64  # rows of x up to which products are made group by group; with more the kernel is made whole first

_QUANTIZED = re.compile(r"(?:(?:layers|prefusion_layers)/(?:stack|last)/.*_proj|lm_head)/kernel")

Quantized = Mapping[str, jax.Array]


def quantize_leaf(path: str, leaf: jax.Array, kind: str) -> jax.Array | Quantized:
    """A parameter as it is kept: quantised if it is the kernel of a large projection, else unchanged.

    Args:
      path: of the leaf in the parameter tree, as "layers/stack/mlp/up_proj/kernel".
      leaf: (in…, out…), or (L, in…, out…) of stacked layers; float.
      kind: one of `config.QUANTIZATIONS`.
    """
    if not _QUANTIZED.fullmatch(path):
        return leaf
    inputs = 2 if "/o_proj/" in path else 1
    one = functools.partial(quantize, inputs=inputs, kind="int8" if path.startswith("lm_head") else kind)
    with_layers = (lambda x: jax.lax.map(one, x)) if "/stack/" in path else one  # a layer at a time: in float32 it is large
    return jax.jit(with_layers)(leaf)


def quantize(kernel: jax.Array, *, inputs: int, kind: str) -> Quantized:
    """A kernel (in…, out…) with so many input axes -> values and float32 scale, as drawn above."""
    kernel = kernel.astype(jnp.float32)
    if kind == "int4":
        *outer, last = kernel.shape[:inputs]
        group = math.gcd(last, GROUP)
        kernel = kernel.reshape(math.prod(outer) * last // group, group, *kernel.shape[inputs:])
        axes, largest, dtype = (1,), 7, jnp.int4
    else:
        axes, largest, dtype = tuple(range(inputs)), 127, jnp.int8
    scale = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True) / largest
    values = jnp.round(kernel / jnp.where(scale > 0, scale, 1))
    return {"values": values.astype(dtype), "scale": jnp.squeeze(scale, axes)}


def is_quantized(kernel: Any) -> bool:
    """Whether a kernel is in the form that `quantize` gives."""
    return isinstance(kernel, Mapping) and "scale" in kernel


def project(x: jax.Array, kernel: Quantized, inputs: int, dtype: Any) -> jax.Array:
    """x (…, in…) times a quantised kernel with so many input axes -> (…, out…), in `dtype`, or that of x where it is None."""
    values, scale = kernel["values"], kernel["scale"]
    dtype = x.dtype if dtype is None else dtype
    if values.dtype == jnp.int8:
        y = jnp.tensordot(x, values.astype(x.dtype), axes=inputs, preferred_element_type=jnp.float32)
        return (y * scale).astype(dtype)
    batch, out = x.shape[: x.ndim - inputs], values.shape[2:]
    values, scale = values.reshape(*values.shape[:2], -1), scale.reshape(len(scale), -1)  # (G,g,O), (G,O)
    rows = x.reshape(-1, *values.shape[:2])  # (R,G,g)
    if len(rows) <= FEW:  # memory is what limits: read the kernel as it is
        y = jnp.einsum("rgk,gko->rgo", rows, values.astype(x.dtype), preferred_element_type=jnp.float32)
        y = jnp.einsum("rgo,go->ro", y, scale)
    else:
        whole = (values.astype(jnp.float32) * scale[:, None]).astype(x.dtype)
        y = jnp.tensordot(rows, whole, axes=2, preferred_element_type=jnp.float32)
    return y.reshape(*batch, *out).astype(dtype)

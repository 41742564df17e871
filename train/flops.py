"""Matrix products of a training step, and how many a device could do: for the model's FLOPs utilisation.

A product of (m,k) and (k,n) counts 2·m·k·n. Counted is what the model needs, padding included, and attention over all pairs
of positions, as is usual for this figure; what is computed a second time to save memory is not.

Axis letters: N images of a batch, P tiles, G patch grid side, S prefix length, V vision tokens per image, I instruction
tokens, T decoder positions, Q labelled positions, D and Dv widths.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import jax.numpy as jnp

from lmm_jax.analysis import products
from lmm_jax.analysis.products import Product
from lmm_jax.config import ModelConfig

Trained = Callable[[str], bool]

# Dense bfloat16 FLOP/s of one jax device. Google: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p, v6e and tpu7x, "peak
# compute per chip"; a chip of TPU7x is two devices. NVIDIA: data sheets of A100, H100, H200 and DGX B200 as others
# quote them, figures "with sparsity" halved.
_PEAK: tuple[tuple[str, float], ...] = (
    (r"TPU v4", 275e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6( lite|e)", 918e12),
    (r"TPU ?v?7x?", 2307e12 / 2),
    (r"NVIDIA A100\b.*", 312e12),
    (r"NVIDIA H100 PCIe.*", 756e12),
    (r"NVIDIA H[12]00 NVL.*", 835e12),
    (r"NVIDIA H[12]00\b.*", 989e12),
    (r"NVIDIA B200\b.*", 2250e12),
)


def peak_flops(device_kind: str, dtype: jnp.dtype | str) -> float | None:
    """Dense FLOP/s of one device, as its maker states them; None where that is not known.

    Args:
      device_kind: `jax.Device.device_kind`.
      dtype: of arithmetic; known for bfloat16 only.
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or "MIG" in device_kind:
        return None
    return next((peak for pattern, peak in _PEAK if re.fullmatch(pattern, device_kind)), None)


def model_flops(
    config: ModelConfig, *, rows: int, images: int, length: int, fused: int, targets: int, trained: Trained
) -> float:
    """FLOPs of the forward and backward pass of a batch: the sum of `component_flops`, which see."""
    shape = {"rows": rows, "images": images, "length": length, "fused": fused, "targets": targets}
    return sum(component_flops(config, **shape, trained=trained).values())


def component_flops(
    config: ModelConfig, *, rows: int, images: int, length: int, fused: int, targets: int, trained: Trained
) -> dict[str, float]:
    """FLOPs of the forward and backward pass of a batch, by top-level module.

    Backward, a weight costs as much as forward where it is trained, and an activation where something trained lies below it.
    Adapters (LoRA) count as a trained part of their projection, their own few products do not.

    Args:
      config: of the model.
      rows: of the batch (B).
      images: of each row (n).
      length: decoder positions of each row (T).
      fused: instruction tokens of each row (I).
      targets: labelled positions of each row (Q).
      trained: whether the parameter at a path ("layers/stack/mlp/up_proj/kernel") is trained.
    """
    d, n = config.decoder, rows * images
    parts, below = {}, False
    if n:
        parts, below = _image_side(config, n, trained)
    if n and config.prefusion_layers:
        prefix, tokens = config.prefix_length, config.tokens_per_image
        path, number = "prefusion_layers", config.prefusion_layers
        layers = products.decoder(path, d, number, rows=n, tokens=prefix, last=tokens, keys=prefix)
        layers += products.decoder(path, d, number, rows=n, tokens=fused, last=fused, keys=prefix + fused)
        parts["prefusion_layers"] = _layers_cost(layers, trained, below)
        below |= _any(layers, trained)
    else:  # with pre-fusion, word embeddings enter without gradient
        below |= trained("embed_tokens/embedding")
    layers = products.decoder("layers", d, d.num_layers, rows=rows, tokens=length, last=targets, keys=length)
    parts["layers"] = _layers_cost(layers, trained, below)
    below |= _any(layers, trained) or trained("norm/scale")
    parts["lm_head"] = _cost(products.head(d, rows * targets), trained, below)
    return parts


def _any(of: list[Product], trained: Trained) -> bool:
    """Whether a kernel or its adapter is trained."""
    return any(p.kernel and (trained(p.kernel) or trained(p.kernel.replace("kernel", "lora_a"))) for p in of)


def _cost(of: list[Product], trained: Trained, below: bool) -> float:
    """Forward and backward cost of products that follow each other; `below`: something trained lies below the first."""
    total = 0.0
    for p in of:
        gradients = below + trained(p.kernel) if p.kernel else 2 * below
        total += p.flops * (1 + gradients)
        below |= _any([p], trained)
    return total


def _layers_cost(of: list[Product], trained: Trained, below: bool) -> float:
    """The same for a stack of equal layers: each one's products follow all of the layer before, or its own norm."""
    return _cost(of, trained, below or _any(of, trained))


def _image_side(c: ModelConfig, n: int, trained: Trained) -> tuple[dict[str, float], bool]:
    """Encoder, compressor and projector over n images; whether anything in them is trained."""
    v, d = c.vision.hidden_size, c.decoder.hidden_size
    patches = products.patches(c.vision, n * c.tiles)
    encoder = products.encoder(c.vision, n * c.tiles, layers=c.vision.num_layers - 1)
    seen = _any(patches, trained)
    parts = {"vision_tower": _cost(patches, trained, False) + _layers_cost(encoder, trained, seen)}
    seen |= _any(encoder, trained)
    coarse, fine = c.vision.grid**2, (c.resolution_ratio * c.vision.grid) ** 2
    groups = [(coarse, seen)]  # what is projected: tokens of an image, and whether something below is trained
    if c.compressor:
        compressor = products.compressor(c.compressor, v, n, fine)
        parts["compressor"] = _layers_cost(compressor, trained, seen)
        groups = [(c.prefix_length - c.tokens_per_image, seen)] if c.prefusion_layers else []
        groups += [(c.tokens_per_image, seen or _any(compressor, trained))]
    parts["mm_projector"] = sum(_cost(products.projector(v, d, n * tokens), trained, below) for tokens, below in groups)
    below = any(below for _, below in groups)
    return parts, below or _any(products.projector(v, d, n), trained)

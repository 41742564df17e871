"""Matrix products of a training step, and how many a device could do: for the model's FLOPs utilisation.

A product of (m,k) and (k,n) counts 2·m·k·n. Counted is what the model needs, padding included, and attention over all pairs
of positions, as is usual for this figure; what is computed a second time to save memory is not.

Axis letters: N images of a batch, P tiles, G patch grid side, S prefix length, V vision tokens per image, I instruction
tokens, T decoder positions, Q labelled positions, D and Dv widths.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax.numpy as jnp

from lmm_jax.config import DecoderConfig, ModelConfig, VisionConfig

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
        layers = _stack("prefusion_layers", d, config.prefusion_layers, n, prefix, tokens, prefix)
        layers += _stack("prefusion_layers", d, config.prefusion_layers, n, fused, fused, prefix + fused)
        parts["prefusion_layers"] = _layers_cost(layers, trained, below)
        below |= _any(layers, trained)
    else:  # with pre-fusion, word embeddings enter without gradient
        below |= trained("embed_tokens/embedding")
    layers = _stack("layers", d, d.num_layers, rows, length, targets, length)
    parts["layers"] = _layers_cost(layers, trained, below)
    below |= _any(layers, trained) or trained("norm/scale")
    table = "embed_tokens/embedding" if d.tie_word_embeddings else "lm_head/kernel"
    parts["lm_head"] = _cost([_Product(table, 2.0 * rows * targets * d.hidden_size * d.vocab_size)], trained, below)
    return parts


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product with the kernel at a path, or of two activations where that is ""; `flops` forward."""

    kernel: str
    flops: float


def _any(products: list[_Product], trained: Trained) -> bool:
    """Whether a kernel or its adapter is trained."""
    return any(p.kernel and (trained(p.kernel) or trained(p.kernel.replace("kernel", "lora_a"))) for p in products)


def _cost(products: list[_Product], trained: Trained, below: bool) -> float:
    """Forward and backward cost of products that follow each other; `below`: something trained lies below the first."""
    total = 0.0
    for p in products:
        gradients = below + trained(p.kernel) if p.kernel else 2 * below
        total += p.flops * (1 + gradients)
        below |= _any([p], trained)
    return total


def _layers_cost(products: list[_Product], trained: Trained, below: bool) -> float:
    """The same for a stack of equal layers: each one's products follow all of the layer before, or its own norm."""
    return _cost(products, trained, below or _any(products, trained))


def _stack(path: str, c: DecoderConfig, length: int, rows: int, tokens: int, last_queries: int, keys: int) -> list[_Product]:
    """Decoder layers over rows of `tokens` new positions that see `keys`; the last one runs for `last_queries` of them."""
    stacked = _decoder_layer(f"{path}/stack", c, rows, tokens, tokens, keys) if length > 1 else []
    last = _decoder_layer(f"{path}/last", c, rows, tokens, last_queries, keys)
    return [dataclasses.replace(p, flops=p.flops * (length - 1)) for p in stacked] + last


def _decoder_layer(path: str, c: DecoderConfig, rows: int, tokens: int, queries: int, keys: int) -> list[_Product]:
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    x = 2.0 * rows * c.hidden_size
    return [
        _Product(f"{path}/self_attn/q_proj/kernel", x * queries * q),
        _Product(f"{path}/self_attn/k_proj/kernel", x * tokens * kv),
        _Product(f"{path}/self_attn/v_proj/kernel", x * tokens * kv),
        _Product("", 4.0 * rows * queries * keys * q),
        _Product(f"{path}/self_attn/o_proj/kernel", x * queries * q),
        *(_Product(f"{path}/mlp/{name}_proj/kernel", x * queries * c.intermediate_size) for name in ("gate", "up", "down")),
    ]


def _image_side(c: ModelConfig, n: int, trained: Trained) -> tuple[dict[str, float], bool]:
    """Encoder, compressor and projector over n images; whether anything in them is trained."""
    v, d = c.vision.hidden_size, c.decoder.hidden_size
    patches, encoder = _encoder(c.vision, n * c.tiles)
    seen = _any([patches], trained)
    parts = {"vision_tower": _cost([patches], trained, False) + _layers_cost(encoder, trained, seen)}
    seen |= _any(encoder, trained)
    coarse, fine = c.vision.grid**2, (c.resolution_ratio * c.vision.grid) ** 2
    groups = [(coarse, seen)]  # what is projected: tokens of an image, and whether something below is trained
    if c.compressor:
        compressor = _compressor(v, n, c.tokens_per_image, fine)
        parts["compressor"] = _layers_cost(compressor, trained, seen)
        groups = [(c.prefix_length - c.tokens_per_image, seen)] if c.prefusion_layers else []
        groups += [(c.tokens_per_image, seen or _any(compressor, trained))]
    parts["mm_projector"] = sum(_cost(_projector(v, d, n * tokens), trained, below) for tokens, below in groups)
    below = any(below for _, below in groups)
    return parts, below or _any(_projector(v, d, n), trained)


def _encoder(c: VisionConfig, pictures: int) -> tuple[_Product, list[_Product]]:
    """The patch embedding, and the layers."""
    tokens, width, path = c.grid**2 + 1, c.hidden_size, "vision_tower/layers/stack"
    x = 2.0 * pictures * (c.num_layers - 1) * tokens * width
    patches = 2.0 * pictures * c.grid**2 * 3 * c.patch_size**2 * width
    return _Product("vision_tower/embeddings/patch_embedding/kernel", patches), [
        *(_Product(f"{path}/self_attn/{name}_proj/kernel", x * width) for name in ("q", "k", "v", "out")),
        _Product("", 2 * x * tokens),
        *(_Product(f"{path}/mlp/{name}/kernel", x * c.intermediate_size) for name in ("fc1", "fc2")),
    ]


def _compressor(width: int, n: int, tokens: int, features: int) -> list[_Product]:
    path = "compressor/attn"
    return [
        _Product(f"{path}/q_proj/kernel", 2.0 * tokens * width**2),  # the same queries for all images
        *(_Product(f"{path}/{name}_proj/kernel", 2.0 * n * features * width**2) for name in ("k", "v")),
        _Product("", 4.0 * n * tokens * features * width),
        _Product(f"{path}/out_proj/kernel", 2.0 * n * tokens * width**2),
    ]


def _projector(v: int, d: int, tokens: int) -> list[_Product]:
    return [
        _Product("mm_projector/linear_1/kernel", 2.0 * tokens * v * d),
        _Product("mm_projector/linear_2/kernel", 2.0 * tokens * d * d),
    ]

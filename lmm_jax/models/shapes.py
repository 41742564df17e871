"""Every parameter of the model and its shape (spec sections 1 to 5), as the modules declare them.

Flax can only tell by tracing the whole model, which takes longer than to load a small one. A test holds the two together.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lmm_jax.config import CompressorConfig, DecoderConfig, ModelConfig, VisionConfig

Shape = tuple[int, ...]


def param_shapes(config: ModelConfig) -> Any:
    """Nested dict of ShapeDtypeStructs (float32), without shardings."""
    c, d = config, config.decoder
    width, vision = (d.hidden_size,), (c.vision.hidden_size,)
    tree = {
        "vision_tower": _vision_tower(c.vision),
        "mm_projector": {"linear_1": _biased(vision, width), "linear_2": _biased(width, width)},
        "embed_tokens": {"embedding": (d.vocab_size, *width)},
        "layers": _layers(d, d.num_layers),
        "norm": {"scale": width},
    }
    if c.compressor:
        tree["compressor"] = _compressor(c.compressor, vision)
    if c.prefusion_layers:
        tree["prefusion_layers"] = _layers(d, c.prefusion_layers)
    if not d.tie_word_embeddings:
        tree["lm_head"] = _linear(width, (d.vocab_size,))
    return _map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree)


def _vision_tower(v: VisionConfig) -> Any:
    """All blocks but the last, which is never run."""
    width, hidden, heads = (v.hidden_size,), (v.intermediate_size,), (v.num_heads, v.head_dim)
    block = {
        "layer_norm1": _norm(width),
        "self_attn": _attention(width, heads),
        "layer_norm2": _norm(width),
        "mlp": {"fc1": _biased(width, hidden), "fc2": _biased(hidden, width)},
    }
    return {
        "embeddings": {
            "class_embedding": width,
            "patch_embedding": _linear((3 * v.patch_size**2,), width),
            "position_embedding": {"embedding": (v.grid**2 + 1, *width)},
        },
        "pre_layrnorm": _norm(width),
        "layers": {"stack": _stacked(block, v.num_layers - 1)},
    }


def _compressor(c: CompressorConfig, width: Shape) -> Any:
    table, heads = (c.num_queries, *width), (c.num_heads, width[0] // c.num_heads)
    norms = {"ln_q": _norm(width), "ln_kv": _norm(width)}
    return {"query": table, "pos_embed": table, "attn": _attention(width, heads), **norms}


def _layers(d: DecoderConfig, length: int) -> Any:
    """So many layers of LLaMA, the last one by itself."""
    width, hidden = (d.hidden_size,), (d.intermediate_size,)
    query, key = (d.num_heads, d.head_dim), (d.num_kv_heads, d.head_dim)
    layer = {
        "input_layernorm": {"scale": width},
        "self_attn": {
            "q_proj": _linear(width, query),
            "k_proj": _linear(width, key),
            "v_proj": _linear(width, key),
            "o_proj": _linear(query, width),
        },
        "post_attention_layernorm": {"scale": width},
        "mlp": {
            "gate_proj": _linear(width, hidden),
            "up_proj": _linear(width, hidden),
            "down_proj": _linear(hidden, width),
        },
    }
    return {"last": layer} | ({"stack": _stacked(layer, length - 1)} if length > 1 else {})


def _attention(width: Shape, heads: Shape) -> Any:
    return {f"{x}_proj": _biased(width, heads) for x in "qkv"} | {"out_proj": _biased(heads, width)}


def _linear(inputs: Shape, outputs: Shape) -> dict[str, Shape]:
    return {"kernel": (*inputs, *outputs)}


def _biased(inputs: Shape, outputs: Shape) -> dict[str, Shape]:
    return {**_linear(inputs, outputs), "bias": outputs}


def _norm(width: Shape) -> dict[str, Shape]:
    return {"scale": width, "bias": width}


def _stacked(layer: Any, length: int) -> Any:
    return _map(lambda shape: (length, *shape), layer)


def _map(of: Any, tree: Any) -> Any:
    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, tuple))

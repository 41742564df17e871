"""The table of names: Hugging Face tensor <-> our leaves on disk, generated from a model's configuration.

Nothing here touches a value; how values change is `conversion.transforms`. Sources: spec sections 1-5 and 9.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from conversion.transforms import LINEAR, PATCHES, RESHAPE, Shape, Transform
from lmm_jax.config import CompressorConfig, DecoderConfig, ModelConfig, VisionConfig

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor and the leaves that hold it.

    Several leaves are equal parts of the tensor along its first axis (torch packs q, k and v this way).
    """

    tensor: str
    shape: Shape
    leaves: tuple[tuple[str, Shape], ...]  # disk name, shape
    transform: Transform

    def leaf(self, index: int, tensor: np.ndarray) -> np.ndarray:
        """Leaf number `index`, contiguous, from the tensor (`shape`), dtype kept."""
        part = np.split(tensor, len(self.leaves))[index]
        return np.ascontiguousarray(self.transform.forward(part, self.leaves[index][1]))

    def place(self, index: int, part: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """Where a slice of leaf number `index` lies in the tensor, itself a slice; None where it is not one.

        Inputs and outputs of a kernel may be cut along their first axis, as meshes cut them: whole heads, not parts of each.
        """
        shape = self.leaves[index][1]
        rows = self.shape[0] // len(self.leaves)
        if self.transform is RESHAPE and len(self.shape) == len(shape):
            groups = [(i, i + 1) for i in range(len(shape))]
        elif self.transform is RESHAPE and len(self.shape) == 1:
            groups = [(0, len(shape))]
        elif self.transform is LINEAR:
            inputs = next(i for i in range(len(shape) + 1) if math.prod(shape[:i]) == self.shape[1])
            groups = [(inputs, len(shape)), (0, inputs)]
        else:
            return None
        place = []
        for start, stop in groups:
            inner = math.prod(shape[start + 1 : stop])
            if any((p.start, p.stop) != (0, n) for p, n in zip(part[start + 1 : stop], shape[start + 1 : stop])):
                return None
            place.append(slice(part[start].start * inner, part[start].stop * inner))
        place[0] = slice(place[0].start + index * rows, place[0].stop + index * rows)
        return tuple(place)

    def join(self, leaves: list[np.ndarray]) -> np.ndarray:
        """The tensor (`shape`), contiguous, from all its leaves in order; the inverse of `leaf`."""
        part_shape = (self.shape[0] // len(leaves), *self.shape[1:])
        parts = [self.transform.inverse(leaf, part_shape) for leaf in leaves]
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def table(config: ModelConfig) -> list[Entry]:
    """Every tensor of a checkpoint with this configuration, each of our leaves on disk exactly once.

    The last CLIP block and CLIP's post-layernorm are part of it: the model never runs them, an export needs them.
    """
    d, entries = config.decoder, []
    entries.append(_plain(EMBEDDING, "embed_tokens.embedding", (d.vocab_size, d.hidden_size)))
    for i in range(d.num_layers):
        entries += _decoder_layer(d, f"layers.{i}.")
    entries.append(_plain("model.norm.weight", "norm.scale", (d.hidden_size,)))
    if not d.tie_word_embeddings:
        entries.append(_linear(HEAD, "lm_head.kernel", (d.hidden_size,), (d.vocab_size,)))
    for i in range(config.prefusion_layers):
        entries += _decoder_layer(d, f"prefusion_layers.{i}.")
    dv = config.vision.hidden_size
    for theirs, ours, width in (("0", "linear_1", dv), ("2", "linear_2", d.hidden_size)):
        entries += _dense(f"model.mm_projector.{theirs}.", f"mm_projector.{ours}.", (width,), (d.hidden_size,))
    if config.compressor:
        entries += _compressor(config.compressor, dv)
    return entries + vision_table(config.vision)


def vision_table(v: VisionConfig) -> list[Entry]:
    """The CLIP part of `table`, named as inside a whole checkpoint (`VISION_PREFIX`)."""
    dv, heads = v.hidden_size, (v.num_heads, v.head_dim)
    theirs, ours = VISION_PREFIX + "embeddings.", "vision_tower.embeddings."
    p = v.patch_size
    patches = (ours + "patch_embedding.kernel", (p * p * 3, dv))
    entries = [
        _plain(theirs + "class_embedding", ours + "class_embedding", (dv,)),
        Entry(theirs + "patch_embedding.weight", (dv, 3, p, p), (patches,), PATCHES),
        _plain(theirs + "position_embedding.weight", ours + "position_embedding.embedding", (v.grid**2 + 1, dv)),
        *_layer_norm(VISION_PREFIX + "pre_layrnorm.", "vision_tower.pre_layrnorm.", dv),
        *_layer_norm(VISION_PREFIX + "post_layernorm.", "vision_tower.post_layernorm.", dv),
    ]
    for i in range(v.num_layers):
        theirs, ours = f"{VISION_PREFIX}encoder.layers.{i}.", f"vision_tower.layers.{i}."
        for norm in ("layer_norm1.", "layer_norm2."):
            entries += _layer_norm(theirs + norm, ours + norm, dv)
        for proj in ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."):
            entries += _dense(theirs + proj, ours + proj, (dv,), heads)
        entries += _dense(theirs + "self_attn.out_proj.", ours + "self_attn.out_proj.", heads, (dv,))
        entries += _dense(theirs + "mlp.fc1.", ours + "mlp.fc1.", (dv,), (v.intermediate_size,))
        entries += _dense(theirs + "mlp.fc2.", ours + "mlp.fc2.", (v.intermediate_size,), (dv,))
    return entries


def _decoder_layer(d: DecoderConfig, ours: str) -> list[Entry]:
    """One LLaMA layer (no biases); ours and theirs differ by "model." and the last part only."""
    width, query, key = (d.hidden_size,), (d.num_heads, d.head_dim), (d.num_kv_heads, d.head_dim)
    mlp = (d.intermediate_size,)
    kernels = {
        "self_attn.q_proj": (width, query),
        "self_attn.k_proj": (width, key),
        "self_attn.v_proj": (width, key),
        "self_attn.o_proj": (query, width),
        "mlp.gate_proj": (width, mlp),
        "mlp.up_proj": (width, mlp),
        "mlp.down_proj": (mlp, width),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    return [_plain(f"model.{ours}{n}.weight", f"{ours}{n}.scale", width) for n in norms] + [
        _linear(f"model.{ours}{n}.weight", f"{ours}{n}.kernel", *axes) for n, axes in kernels.items()
    ]


def _compressor(c: CompressorConfig, dv: int) -> list[Entry]:
    theirs, ours = "model.compressor.", "compressor."
    heads = (c.num_heads, dv // c.num_heads)
    packed = [f"{ours}attn.{x}_proj." for x in "qkv"]
    weights = tuple((name + "kernel", (dv, *heads)) for name in packed)
    biases = tuple((name + "bias", heads) for name in packed)
    return [
        _plain(theirs + "query", ours + "query", (c.num_queries, dv)),
        _plain(theirs + "pos_embed", ours + "pos_embed", (c.num_queries, dv)),
        *_layer_norm(theirs + "ln_q.", ours + "ln_q.", dv),
        *_layer_norm(theirs + "ln_kv.", ours + "ln_kv.", dv),
        Entry(theirs + "attn.in_proj_weight", (3 * dv, dv), weights, LINEAR),
        Entry(theirs + "attn.in_proj_bias", (3 * dv,), biases, RESHAPE),
        *_dense(theirs + "attn.out_proj.", ours + "attn.out_proj.", heads, (dv,)),
    ]


def _plain(tensor: str, leaf: str, shape: Shape) -> Entry:
    return Entry(tensor, shape, ((leaf, shape),), RESHAPE)


def _linear(tensor: str, leaf: str, inputs: Shape, outputs: Shape) -> Entry:
    return Entry(tensor, (int(np.prod(outputs)), int(np.prod(inputs))), ((leaf, inputs + outputs),), LINEAR)


def _dense(theirs: str, ours: str, inputs: Shape, outputs: Shape) -> list[Entry]:
    """A projection with a bias."""
    bias = Entry(theirs + "bias", (int(np.prod(outputs)),), ((ours + "bias", outputs),), RESHAPE)
    return [_linear(theirs + "weight", ours + "kernel", inputs, outputs), bias]


def _layer_norm(theirs: str, ours: str, width: int) -> list[Entry]:
    return [_plain(theirs + "weight", ours + "scale", (width,)), _plain(theirs + "bias", ours + "bias", (width,))]

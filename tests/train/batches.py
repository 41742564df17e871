"""Batches as `train.data` makes them, from rows or from golden arrays; and the state they train."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from published import rows_of

from lmm_jax.config import IGNORE_LABEL
from lmm_jax.data.layout import lay_out
from lmm_jax.models.llava_mini import LlavaMini
from train.config import GroupConfig, OptimizerConfig
from train.optimizer import assign_groups, make_optimizer
from train.step import TrainState, train_step

PROJECTOR = r"mm_projector/.*"
STAGE_1 = (GroupConfig(PROJECTOR, 1e-3), GroupConfig(r"(?!mm_projector/).*"))
STAGE_2 = (
    GroupConfig(PROJECTOR, 1e-5),
    GroupConfig(r"(layers|prefusion_layers|norm|lm_head|embed_tokens|compressor/(?!pos_embed))\b.*", 1e-4),
    GroupConfig(r"vision_tower/.*|compressor/pos_embed"),
)


LENGTH, FUSED, TARGETS = 40, 24, 16  # one bucket, so that batches share programs


def batch_of(rows, config, pixels=None):
    """Rows, each with the same number of images, and their pixels (N,P,H,W,3) -> arrays of a batch."""
    layout = lay_out(rows, config, length=LENGTH, fused=FUSED)
    labelled = layout.labels[:, 1:] != IGNORE_LABEL
    queries = np.full((len(rows), TARGETS), LENGTH - 1, np.int32)
    targets = np.full_like(queries, IGNORE_LABEL)
    for b, found in enumerate(map(np.flatnonzero, labelled)):
        queries[b, : len(found)], targets[b, : len(found)] = found, layout.labels[b, found + 1]
    n = sum(rows[0].images)
    first = (np.arange(len(rows)) * n * config.tokens_per_image)[:, None]
    batch = {
        "ids": layout.ids,
        "fused_index": layout.fused_index,
        "vision_index": np.where(layout.vision_index >= 0, layout.vision_index - first, -1),
        "fused_ids": layout.fused_ids,
        "queries": queries,
        "targets": targets,
        "lengths": layout.lengths,
        "used": np.ones(len(rows), np.int32),
        "skipped": np.zeros(len(rows), np.int32),
    }
    if n:
        batch["pixels"] = pixels.reshape(len(rows), n, *pixels.shape[1:])
    return batch


def golden_batch(arrays, config):
    """The batch of a training scenario."""
    pixels = np.moveaxis(arrays["pixel_values"].reshape(-1, *arrays["pixel_values"].shape[-4:]), 2, -1)
    return batch_of(rows_of(arrays), config, pixels)


def split(params, groups):
    """Nested parameters -> trained, frozen (flat), and the groups of the trained ones."""
    flat = traverse_util.flatten_dict(params, sep="/")
    trained = {p: g for p, g in assign_groups(flat, groups).items() if g.learning_rate is not None}
    return {p: flat[p] for p in trained}, {p: x for p, x in flat.items() if p not in trained}, trained


def stepping(config, params, groups):
    """A compiled `train_step` of a run of 100 steps without warm-up, and its first state."""
    trained, frozen, assigned = split(params, groups)
    update = make_optimizer(OptimizerConfig(warmup=0.0), assigned, 100)
    step = jax.jit(functools.partial(train_step, LlavaMini(config), update, 256, 1))
    return step, TrainState(jnp.int32(0), trained, frozen, jax.jit(update.init)(trained))

"""Counted FLOPs against those that XLA counts in the program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from batches import STAGE_1, STAGE_2, split

from lmm_jax import sharding
from lmm_jax.config import CompressorConfig, DecoderConfig, ModelConfig, VisionConfig, named_sizes
from lmm_jax.models.llava_mini import LlavaMini, abstract_params
from train.config import GroupConfig
from train.flops import component_flops, model_flops, peak_flops
from train.step import gradients

ALL = (GroupConfig(".*", 1e-3),)
# XLA counts a loop's body once, so loops have one turn: two layers, one of which is scanned. Wide, so that products prevail.
MINI = ModelConfig(
    VisionConfig(256, 768, 2, 8, patch_size=14, image_size=56),
    DecoderConfig(96, 384, 1024, 2, 6, 2, 64),
    CompressorConfig(2),
    prefusion_layers=2,
)
HD = dataclasses.replace(MINI, resolution_ratio=2)
V1_5 = dataclasses.replace(MINI, compressor=None, prefusion_layers=0)
SHAPE = {"rows": 2, "images": 2, "length": 48, "fused": 24, "targets": 16}


def program_flops(config, groups, rows, images, length, fused, targets):
    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    trained, frozen, _ = split(abstract_params(config, sharding.make_mesh()), groups)
    batch = {name: ints(rows, length) for name in ("ids", "fused_index", "vision_index")}
    batch |= {"fused_ids": ints(rows, fused), "queries": ints(rows, targets), "targets": ints(rows, targets)}
    if images:
        side = config.vision.image_size
        batch["pixels"] = jax.ShapeDtypeStruct((rows, images, config.tiles, side, side, 3), jnp.float32)
    take = functools.partial(gradients, LlavaMini(config, attention="plain"), targets, 1)
    return jax.jit(take).lower(trained, frozen, batch).cost_analysis()["flops"], set(trained)


@pytest.mark.parametrize(
    "config,groups,images",
    [(MINI, STAGE_2, 2), (MINI, ALL, 2), (MINI, STAGE_2, 0), (HD, STAGE_2, 1), (V1_5, STAGE_1, 1)],
    ids=("stage-2", "all", "text", "hd", "stage-1"),
)
def test_as_the_compiler_counts(config, groups, images):
    shape = SHAPE | {"images": images}
    found, trained = program_flops(config, groups, **shape)
    parts = component_flops(config, **shape, trained=trained.__contains__)
    again = 2.0 * shape["rows"] * shape["targets"] * config.decoder.hidden_size * config.decoder.vocab_size  # see the loss
    assert sum(parts.values()) + again == pytest.approx(found, rel=0.02)


def test_what_is_frozen_costs_less():
    count = functools.partial(model_flops, named_sizes()["llava-v1.5-7b"], rows=1, images=1, length=640, fused=1, targets=640)
    forward, everything = count(trained=lambda _: False), count(trained=lambda _: True)
    stage_1 = count(trained=lambda path: path.startswith("mm_projector"))
    lora = count(trained=lambda path: path.startswith("layers") and path.endswith("lora_a"))
    assert everything == pytest.approx(3 * forward, rel=0.01)
    assert 1.9 * forward < stage_1 < 2 * forward  # activations of the decoder, weights of the projector
    assert 1.8 * forward < lora < stage_1
    # the published figure of one picture, spec section 12: 8.55 T, with fewer positions of text
    assert 8e12 < count(trained=lambda _: False, length=600) < 9e12


@pytest.mark.parametrize(
    "kind,peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak(kind, peak):
    assert peak_flops(kind, jnp.bfloat16) == peak
    assert peak_flops(kind, "float32") is None

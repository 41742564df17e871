"""Where the compressor looks (the paper's figure of compression maps)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lmm_jax.config import ModelConfig
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Assistant
from lmm_jax.models.llava_mini import LlavaMini


def compression_maps(assistant: Assistant, pixels: np.ndarray) -> np.ndarray:
    """How much each of an image's vision tokens is made of each part of it.

    Args:
      assistant: a model with a compressor.
      pixels: (P,H,W,3) uint8, as `Assistant.read_picture` gives.

    Returns:
      (C²,nG,nG) float32, mean over heads; each map sums to 1.

    Raises:
      UserError: the model has no compressor.
    """
    if not assistant.config.compressor:
        raise UserError("this model has no compressor, it gives its decoder all vision tokens: there is no map to show")
    engine = assistant.engine
    with jax.set_mesh(engine.mesh):
        found = _program(assistant.config, engine.dtype)(engine.params, pixels[None])
    side = round(found.shape[-1] ** 0.5)
    return np.asarray(found[0]).reshape(-1, side, side)


@functools.lru_cache
def _program(config: ModelConfig, dtype: Any) -> Callable[[Any, jax.Array], jax.Array]:
    model = LlavaMini(config, dtype)

    def maps(module: LlavaMini, pixels: jax.Array) -> jax.Array:
        features = module.vision_features(pixels)
        fine = module.stitch(features[:, :-1]) if module.config.resolution_ratio > 1 else features[:, -1]
        return module.compress(fine)[1]

    return jax.jit(lambda params, pixels: model.apply({"params": params}, pixels, method=maps))

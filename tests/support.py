"""What several tests share: golden arrays, converted checkpoints, small models."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lmm_jax.checkpoint import load_params
from lmm_jax.config import ModelConfig
from lmm_jax.inference.engine import Request
from lmm_jax.inference.sampling import Sampling
from lmm_jax.models.llava_mini import abstract_params

GOLDEN = Path(__file__).parent / "golden"
CASES = ("image_c1", "hd_c2", "llava_v1_5")
INFERENCE = [
    ("image_c1", "inference"),
    ("image_c1", "inference_token_zero"),
    ("image_c1", "text_only"),
    ("image_c1", "video_4_frames"),
    ("hd_c2", "inference"),
    ("llava_v1_5", "inference"),
]
TRAINING = [
    ("image_c1", "training"),
    ("image_c1", "training_padded"),
    ("image_c1", "training_video_4_frames"),
    ("hd_c2", "training"),
    ("llava_v1_5", "training_stage1"),
]
MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")


def slow(*cases: Any) -> list[Any]:
    """Cases of a parametrized test that only `pytest -m slow` runs; a tuple is one of several arguments."""
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases]


def trained_params(assistant: Any) -> Any:
    """Parameters in the form in which they are trained, and not that which inference on a processor wants."""
    return load_params(assistant.folder, abstract_params(assistant.config, assistant.engine.mesh))


@functools.cache
def golden(case: str, scenario: str) -> dict[str, np.ndarray]:
    """Arrays of one scenario."""
    return load_file(GOLDEN / case / f"{scenario}.safetensors")


def gradient_norms(case: str, scenario: str) -> dict[str, float | None] | None:
    """Gradient norm by parameter name, None where the parameter receives none; None where the scenario has no such file."""
    file = GOLDEN / case / f"{scenario}.gradnorm.json"
    return json.loads(file.read_text()) if file.exists() else None


def relative_error(got, expected) -> float:
    """Norm of the difference over the norm; 0 where there is no difference, infinite where there is no number."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    difference, norm = np.linalg.norm(got - expected), np.linalg.norm(expected)
    if not difference:
        return 0.0
    return float(difference / norm) if norm and np.isfinite(difference) else float("inf")


def picture(seed: int, config: ModelConfig) -> np.ndarray:
    """Random pixels (P,H,W,3)."""
    side = config.vision.image_size
    return np.random.default_rng(seed).integers(0, 256, (config.tiles, side, side, 3), dtype=np.uint8)


def prompt(seed: int, length: int, placeholders: int, vocab: int = 512) -> np.ndarray:
    """Random ids, so many of which stand for images."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab, length)
    ids[rng.choice(length, placeholders, replace=False)] = -200
    return ids


def mixed_requests(config: ModelConfig, count: int, seed: int = 0) -> list[Request]:
    """Text only, one image, several images, a video; lengths and settings of all kinds."""
    rng, requests = np.random.default_rng(seed), []
    for i in range(count):
        kind = i % 4
        media = [picture(100 * i + j, config) for j in range((0, 1, 3, 0)[kind])]
        if kind == 3:
            media = [[picture(100 * i + j, config) for j in range(int(rng.integers(1, 12)))]]
        sampling = Sampling(int(rng.integers(1, 12)), float(i % 3), seed=i)
        requests.append(Request(prompt(i, int(rng.integers(5, 70)), len(media)), media, sampling))
    return requests

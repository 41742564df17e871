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

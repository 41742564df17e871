"""LLaVA-Mini for JAX/Flax: one vision token per image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmm_jax.inference.assistant import Assistant

__all__ = ["load"]


def load(folder: str, **settings: Any) -> Assistant:
    """A model folder ready to answer; see `lmm_jax.inference.loading.load` for the settings."""
    from lmm_jax.inference import loading  # jax is imported when it is needed

    return loading.load(folder, **settings)

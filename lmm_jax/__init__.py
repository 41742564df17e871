"""LLaVA-Mini for JAX/Flax: one vision token per image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lmm_jax.demo import MODEL

if TYPE_CHECKING:
    from lmm_jax.inference.assistant import Assistant

__all__ = ["load"]


def load(folder: str | os.PathLike | None = None, **settings: Any) -> Assistant:
    """A model folder ready to answer; see `lmm_jax.inference.loading.load` for the settings.

    Without a folder it is the demo model, which answers questions about coloured shapes and clips of them.
    """
    from lmm_jax.inference import loading  # jax is imported when it is needed

    return loading.load(MODEL if folder is None else folder, **settings)

"""Hugging Face checkpoint -> parameters on a mesh, without a model folder in between."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from conversion.from_hf import Options, open_checkpoint
from lmm_jax.checkpoint import place_leaves
from lmm_jax.config import ModelConfig
from lmm_jax.models.llava_mini import abstract_params


def onto_mesh(
    src: str,
    mesh: Mesh,
    options: Options | None = None,
    *,
    dtype: Any = "bfloat16",
    base: str | None = None,
    vision: str | None = None,
) -> tuple[ModelConfig, Any]:
    """Loads a checkpoint onto a mesh, of one process or of many; each reads the slices of its own devices only.

    That is so for safetensors; of files that Torch pickled, and where an adapter is merged, whole tensors are read, one at a
    time. All processes must see the same files.

    Args:
      src: folder or hub name.
      mesh: from `sharding.make_mesh`.
      options: see `Options`; `overwrite` and `dtype` have no meaning here.
      dtype: of the parameters.
      base, vision: as of `from_hf`.

    Returns:
      The model's configuration, and its parameters as `models.llava_mini.abstract_params` describes them.

    Raises:
      UserError: see `from_hf`.
    """
    opened = open_checkpoint(src, options or Options(), base=base, vision=vision)
    return opened.config, place_leaves(opened.leaves, abstract_params(opened.config, mesh, dtype))

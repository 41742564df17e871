"""A state of a run -> a model folder, which `lmm ask` loads and `python -m conversion to-hf` exports."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmm_jax import checkpoint
from lmm_jax.checkpoint import LazyLeaf
from lmm_jax.config import ModelConfig
from lmm_jax.errors import UserError
from train.config import StartConfig
from train.step import Params, join

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja", "chat_template.json")  # fmt: skip


def write_model_folder(
    folder: Path, config: ModelConfig, start: StartConfig, tokenizer: Path, trained: Params, frozen: Params, dtype: Any
) -> None:
    """Writes the model, replacing what an earlier call wrote. All processes call this alike; the first one writes.

    Args:
      folder: to write.
      config: of the model.
      start: what the run started from: frozen leaves and those that are only exported are copied from there to the bit.
      tokenizer: folder with the tokenizer's files.
      trained, frozen: path -> parameter, on whatever mesh.
      dtype: of trained leaves, and of all leaves of a model from scratch.

    Raises:
      UserError: the folder cannot be written.
    """
    source = checkpoint.leaf_shapes(start.folder) if start.folder else {}
    trained_names = {n for names in checkpoint.disk_names(join(trained, {})).values() for n in names} if trained else set()
    leaves = _leaves(join(trained, frozen), jnp.dtype(dtype))
    for name, (shape, stored) in source.items():
        if checkpoint.is_export_only(name, config) or (name in leaves and name not in trained_names):
            leaves[name] = LazyLeaf(shape, stored, lambda name=name: checkpoint.read_leaf(start.folder, name))
    if not source:
        leaves |= _export_only(leaves, config, jnp.dtype(dtype))
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if jax.process_index() == 0:
        checkpoint.write_model(folder, config, leaves, files=files, overwrite=True)
    else:  # gathering a leaf needs every process
        for leaf in leaves.values():
            leaf.read()


def _leaves(params: Any, dtype: np.dtype) -> dict[str, LazyLeaf]:
    """Disk name -> leaf; a layer at a time is gathered to the host when it is read."""
    arrays, leaves = checkpoint.leaf_paths(params), {}
    for path, names in checkpoint.disk_names(params).items():
        array, stacked = arrays[path], "/stack/" in path
        shape = array.shape[1:] if stacked else array.shape
        for i, name in enumerate(names):
            leaves[name] = LazyLeaf(shape, dtype, _gather(array, i if stacked else None, dtype))
    return leaves


def _gather(array: jax.Array, layer: int | None, dtype: np.dtype) -> Callable[[], np.ndarray]:
    whole = NamedSharding(array.sharding.mesh, PartitionSpec())

    def read() -> np.ndarray:
        return np.asarray(_take(array, layer, dtype, whole).addressable_data(0))

    return read


def _take(array: jax.Array, layer: int | None, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    if layer is None:
        return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(array)
    return jax.jit(lambda x, i: x[i].astype(dtype), out_shardings=sharding)(array, layer)


def _export_only(leaves: dict[str, LazyLeaf], config: ModelConfig, dtype: np.dtype) -> dict[str, LazyLeaf]:
    """CLIP's last block and last norm for a model from scratch: never run, but part of the format. The block adds nothing."""
    last, made = f"vision_tower.layers.{config.vision.num_layers - 1}.", {}
    for name, leaf in leaves.items():
        if name.startswith("vision_tower.layers.0."):
            made[name.replace("vision_tower.layers.0.", last)] = leaf.shape
    made |= {f"vision_tower.post_layernorm.{part}": (config.vision.hidden_size,) for part in ("scale", "bias")}

    def fill(name: str, shape: tuple[int, ...]) -> LazyLeaf:
        value = 1 if re.search(r"norm\d?\.scale$", name) else 0
        return LazyLeaf(shape, dtype, lambda: np.full(shape, value, dtype))

    return {name: fill(name, shape) for name, shape in made.items()}


def check_folder(folder: Path) -> None:
    """Raises UserError where the model folder of a run could not be written at its end."""
    if folder.exists() and any(folder.iterdir()):
        checkpoint.read_config(folder)  # only a model folder is replaced
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: the run writes its model there")

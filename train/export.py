"""A state of a run -> a model folder, which `lmm ask` loads and `python -m conversion to-hf` exports."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lmm_jax import checkpoint, storage
from lmm_jax.checkpoint import LazyLeaf
from lmm_jax.config import ModelConfig
from lmm_jax.data.tokenize import TOKENIZER_FILES
from lmm_jax.errors import UserError
from train.config import StartConfig, TrainConfig
from train.lora import merge, take_lora
from train.step import Params, join


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
    base, adapters = take_lora({**trained, **frozen})
    names = checkpoint.disk_names(join(base, {}))
    changed = {name for path in base if path in trained or path in adapters for name in names[path]}
    gathered = _leaves(base, adapters, names, jnp.dtype(dtype))
    copied = {
        name: LazyLeaf(shape, stored, functools.partial(checkpoint.read_leaf, start.folder, name))
        for name, (shape, stored) in source.items()
        if checkpoint.is_export_only(name, config) or (name in gathered and name not in changed)
    }
    made = {} if source else _export_only(gathered, config, jnp.dtype(dtype))
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if jax.process_index() == 0:
        checkpoint.write_model(folder, config, gathered | copied | made, files=files, overwrite=True)
    else:  # gathering a leaf needs every process
        for name, leaf in gathered.items():
            if name not in copied:
                leaf.read()
    multihost_utils.sync_global_devices("model folder")  # no process leaves before it is written


def _leaves(
    params: Params, adapters: dict[str, tuple], names: dict[str, tuple[str, ...]], dtype: np.dtype
) -> dict[str, LazyLeaf]:
    """Disk name -> leaf; a layer at a time is merged with its adapter and gathered to the host when it is read."""
    leaves = {}
    for path, array in params.items():
        stacked, arrays = "/stack/" in path, (array, *adapters.get(path, ()))
        shape = array.shape[1:] if stacked else array.shape
        for i, name in enumerate(names[path]):
            leaves[name] = LazyLeaf(shape, dtype, functools.partial(_read, arrays, dtype, *([i] if stacked else [])))
    return leaves


def _read(arrays: tuple[jax.Array, ...], dtype: np.dtype, *layer: int) -> np.ndarray:
    """A leaf, or a layer of a stack, on this host; the arrays after the first are its adapter."""
    gather = _gather(dtype, NamedSharding(arrays[0].sharding.mesh, PartitionSpec()))
    return np.asarray(gather(arrays, *layer).addressable_data(0))


@functools.cache
def _gather(dtype: np.dtype, whole: NamedSharding) -> Callable[..., jax.Array]:
    """Compiled once for each shape."""

    def one(arrays: tuple[jax.Array, ...], *layer: int) -> jax.Array:
        kernel, *adapter = (x[layer] for x in arrays)
        return (merge(kernel, *adapter) if adapter else kernel).astype(dtype)

    return jax.jit(one, out_shardings=whole)


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


def model_folder(config: TrainConfig) -> Path:
    """Where a run's model goes."""
    return storage.as_path(config.kept_in) / "model"


def check_folder(folder: Path) -> None:
    """Raises UserError where the model folder of a run could not be written at its end: only a model folder is replaced."""
    try:
        with storage.reaching(folder):
            if not folder.exists() or checkpoint.is_unfinished(folder) or (folder.is_dir() and not any(folder.iterdir())):
                return
        checkpoint.read_config(folder)
    except (UserError, OSError) as error:
        raise UserError(
            f"the run is to write its model to {folder}, which is taken ({error}): choose another folder"
        ) from error

"""The parameters a run starts from: loaded, added, made from nothing (spec section 10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmm_jax import checkpoint, storage
from lmm_jax.config import CompressorConfig, ModelConfig, named_sizes
from lmm_jax.errors import UserError
from lmm_jax.models.llava_mini import abstract_params, init_parts
from train.config import LoraConfig, StartConfig
from train.lora import add_lora

_OUTPUTS = ("o_proj", "down_proj")  # of a decoder layer: with both zero, the layer is the identity


def model_config(start: StartConfig) -> ModelConfig:
    """The configuration of the model that is trained; reads no weights.

    Raises:
      UserError: the folder is no model folder, or has already another compressor or other pre-fusion layers.
    """
    return _changed(start, start.scratch or checkpoint.read_config(start.folder))


def planned_config(start: StartConfig) -> ModelConfig:
    """The same before the folder is there, where `start.size` says what it will hold.

    Raises:
      UserError: as `model_config`; there is no such size.
    """
    if not start.size or start.scratch or storage.exists(start.folder):
        return model_config(start)
    if start.size not in named_sizes():
        raise UserError(f"start.size {start.size!r} is no size with a name: choose one of {', '.join(named_sizes())}")
    return _changed(start, named_sizes()[start.size])


def _changed(start: StartConfig, config: ModelConfig) -> ModelConfig:
    """What a run makes of the model it starts from."""
    where = start.folder or "start.scratch"
    changes: dict[str, Any] = {}
    if start.compressor_size is not None:
        if config.compressor and config.compressor.size != start.compressor_size:
            raise UserError(
                f"{where} has a compressor of size {config.compressor.size}, not {start.compressor_size}: leave it"
            )
        changes["compressor"] = config.compressor or CompressorConfig(start.compressor_size)
    if start.prefusion_layers is not None:
        if config.prefusion_layers not in (0, start.prefusion_layers):
            raise UserError(
                f"{where} has {config.prefusion_layers} pre-fusion layers, not {start.prefusion_layers}: leave them"
            )
        changes["prefusion_layers"] = start.prefusion_layers
    if start.resolution_ratio is not None:
        changes["resolution_ratio"] = start.resolution_ratio
    for name in ("template", "image_aspect_ratio"):
        if getattr(start, name):
            changes[name] = getattr(start, name)
    return dataclasses.replace(config, **changes)


def tokenizer_folder(start: StartConfig) -> Path:
    """Where the run's tokenizer files lie.

    Raises:
      UserError: a model from scratch without one.
    """
    if not (start.folder or start.tokenizer):
        raise UserError("a model from scratch needs start.tokenizer, a folder with tokenizer files")
    return storage.as_path(start.tokenizer or start.folder)


def abstract_start(config: ModelConfig, lora: LoraConfig, mesh: Mesh, dtype_of: Callable[[str], Any]) -> Any:
    """Shapes, dtypes and shardings of all parameters, adapters among them; `dtype_of` takes a path."""
    tree = abstract_params(config, mesh)

    def typed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = "/".join(key.key for key in path)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype_of(name)), sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(typed, add_lora(tree, lora) if lora.rank else tree)


def initial_params(start: StartConfig, config: ModelConfig, abstract: Any) -> Any:
    """The parameters of step 0, sharded as `abstract` says.

    Args:
      start: of the run.
      config: from `model_config`.
      abstract: from `abstract_start`, without adapters.

    Raises:
      UserError: the folder is damaged or does not fit; more pre-fusion layers to copy than the decoder has.
    """
    if not start.folder:
        new, params = set(abstract), {}
    else:
        source = checkpoint.read_config(start.folder)
        had = {"compressor": source.compressor, "prefusion_layers": source.prefusion_layers}
        new = {name for name in had if name in abstract and not had[name]}
        params = checkpoint.load_params(start.folder, {k: v for k, v in abstract.items() if k not in new})
    if new:
        params |= init_parts(config, {k: abstract[k] for k in new}, start.seed)
    if "prefusion_layers" in new and start.prefusion_init == "llm_first_layers":
        params["prefusion_layers"] = _first_layers(params["layers"], abstract["prefusion_layers"], config)
    elif "prefusion_layers" in new and start.prefusion_init == "identity":
        params["prefusion_layers"] = _without_outputs(params["prefusion_layers"])
    return params


def _first_layers(layers: Any, abstract: Any, config: ModelConfig) -> Any:
    n = config.prefusion_layers
    if n > config.decoder.num_layers:
        raise UserError(
            f"{n} pre-fusion layers cannot start as the first of {config.decoder.num_layers} decoder layers: "
            "choose another start.prefusion_init"
        )

    def copy(layers: Any) -> Any:
        stack = layers.get("stack")
        copied = {"last": layers["last"] if n == config.decoder.num_layers else jax.tree.map(lambda x: x[n - 1], stack)}
        if n > 1:
            copied["stack"] = jax.tree.map(lambda x: x[: n - 1], stack)
        return jax.tree.map(lambda s, x: x.astype(s.dtype), abstract, copied)

    return jax.jit(copy, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))(layers)


def _without_outputs(layers: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x, device=x.sharding) if path[-2].key in _OUTPUTS else x, layers
    )

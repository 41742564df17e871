"""Low-rank adapters: leaves beside a projection's kernel, from the start of a run to the model folder at its end.

    kernel (in…, out…)  +  lora_scale () · lora_a (in…, r) · lora_b (r, out…)        stacked layers have their axis first

`lora_a` starts at random and `lora_b` at zero, so the model starts unchanged. The model itself reads the leaves wherever it
finds them (`models.layers.Proj`); `lora_scale` is α/r and belongs with the frozen parameters.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lmm_jax import sharding
from lmm_jax.errors import UserError
from train.config import LoraConfig

PARTS = ("/lora_a", "/lora_b", "/lora_scale")
_ADAPTABLE = r"(layers|prefusion_layers)/(self_attn|mlp)/\w+_proj"


def add_lora(abstract: Any, config: LoraConfig) -> Any:
    """The tree with the leaves of adapters.

    Args:
      abstract: nested ShapeDtypeStructs with shardings, without adapters.
      config: `targets` matches whole paths of projections, "stack" and "last" left out, as ``layers/self_attn/q_proj``.

    Raises:
      UserError: no projection matches, or one that is not in a decoder layer.
    """
    leaves = sharding.leaf_paths(abstract)
    found = {path: _name(path) for path in leaves if path.endswith("_proj/kernel")}
    found = {path: name for path, name in found.items() if re.fullmatch(config.targets, name)}
    others = sorted({name for name in found.values() if not re.fullmatch(_ADAPTABLE, name)})
    if others or not found:
        raise UserError(
            f"lora.targets {config.targets!r} matches {', '.join(others) or 'no projection'}: it must match projections of "
            "the decoder, as layers/.*_proj"
        )
    new = {}
    for path in found:
        kernel, prefix = leaves[path], path.removesuffix("/kernel")
        layers, inputs, outputs = _sizes(path, kernel.shape)
        for part, shape in zip(PARTS, ((*inputs, config.rank), (config.rank, *outputs), ())):
            new[prefix + part] = jax.ShapeDtypeStruct((*layers, *shape), kernel.dtype)
    mesh = next(iter(leaves.values())).sharding.mesh
    places = sharding.leaf_paths(sharding.param_shardings(traverse_util.unflatten_dict(new, sep="/"), mesh))
    new = {path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=places[path]) for path, s in new.items()}
    return traverse_util.unflatten_dict({**leaves, **new}, sep="/")


def init_lora(abstract: dict[str, jax.ShapeDtypeStruct], config: LoraConfig, seed: int) -> dict[str, jax.Array]:
    """The adapters' leaves at the start of a run: path -> array; each device makes its own shards.

    `lora_a` is uniform within ±1/√inputs, as in the published code (PEFT's).

    Args:
      abstract: path -> shape, dtype and sharding, from `add_lora`; other leaves are passed over.
      config: as there.
      seed: of the random part.
    """
    wanted = {path: s for path, s in abstract.items() if path.endswith(PARTS)}

    def make(key: jax.Array) -> dict[str, jax.Array]:
        made = {}
        for path, s in wanted.items():
            if path.endswith("lora_a"):
                bound = math.prod(s.shape["/stack/" in path : -1]) ** -0.5
                own = jax.random.fold_in(key, zlib.crc32(path.encode()))
                made[path] = jax.random.uniform(own, s.shape, jnp.float32, -bound, bound).astype(s.dtype)
            else:
                made[path] = jnp.full(s.shape, 0.0 if path.endswith("lora_b") else config.alpha / config.rank, s.dtype)
        return made

    return jax.jit(make, out_shardings={path: s.sharding for path, s in wanted.items()})(jax.random.key(seed))


def take_lora(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, Any, Any]]]:
    """Flat parameters -> those of the model without adapters, and kernel path -> lora_a, lora_b, lora_scale."""
    base = {path: leaf for path, leaf in params.items() if not path.endswith(PARTS)}
    adapted = (path.removesuffix("/lora_a") for path in params if path.endswith("/lora_a"))
    return base, {f"{path}/kernel": tuple(params[path + part] for part in PARTS) for path in adapted}


def merge(kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, lora_scale: jax.Array) -> jax.Array:
    """One layer's kernel (in…, out…) with its adapter, computed and returned in float32."""
    a, b = (x.astype(jnp.float32) for x in (lora_a, lora_b))
    product = jnp.tensordot(a, b, axes=1, precision="highest")
    return kernel.astype(jnp.float32) + lora_scale.astype(jnp.float32) * product


def _name(path: str) -> str:
    return re.sub(r"/(stack|last)(?=/)", "", path).removesuffix("/kernel")


def _sizes(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Of a kernel: stacked layers (or nothing), inputs, outputs."""
    layers, rest = (shape[:1], shape[1:]) if "/stack/" in path else ((), shape)
    inputs = 2 if path.endswith("/o_proj/kernel") else 1
    return layers, rest[:inputs], rest[inputs:]

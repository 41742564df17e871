"""LoRA checkpoints (PEFT): an adapter merged on its base while tensors are read (spec section 9)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conversion.readers import Fault, Tensors, open_file, read_json
from lmm_jax.checkpoint import LazyLeaf
from lmm_jax.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"

# Features of PEFT that change what an adapter means, and the values that say "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": ([],),
    "alora_invocation_tokens": (),
    "init_lora_weights": (True, False, "gaussian"),  # the others subtract from the base before training
}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
      UserError: a feature of PEFT that is not supported, by name and value.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    odd = [f"{k} {config[k]!r}" for k, unused in _UNUSED.items() if config.get(k) is not None and config[k] not in unused]
    if odd:
        raise UserError(
            f"{folder / ADAPTER_CONFIG} uses what is not supported ({', '.join(odd)}): merge the adapter with PEFT"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{folder / ADAPTER_CONFIG} has r {rank!r} and lora_alpha {alpha!r}, expected two positive numbers")
    return config


def merge(folder: Path, base: Tensors) -> Tensors:
    """The base's tensors with the adapter in `folder` merged in; ``non_lora_trainables.bin`` replaces or adds whole tensors.

    A merged tensor is W + scale * B @ A in float32, cast back to the base's dtype; scale is alpha / r, or alpha / sqrt(r)
    with ``use_rslora``.

    Raises:
      UserError: no adapter weights, or an unsupported feature. Adapter tensors that fit nothing become faults.
    """
    config = read_adapter_config(folder)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    merged = Tensors(dict(base.leaves), list(base.faults))
    extra = folder / "non_lora_trainables.bin"
    if extra.is_file():
        merged.leaves.update({_base_name(n): leaf for n, leaf in open_file(extra).items()})
    for module, pair in _pairs(folder, merged).items():
        target = merged.leaves.get(f"{module}.weight")
        fault = _misfit(target, pair, rank)
        if fault:
            merged.faults.append(Fault(fault, module, " (LoRA)"))
        else:
            merged.leaves[f"{module}.weight"] = LazyLeaf(target.shape, target.dtype, _reader(target, pair, scale))
    return merged


def _pairs(folder: Path, merged: Tensors) -> dict[str, dict[str, LazyLeaf]]:
    """Module of the base -> its "A" (r, in) and "B" (out, r)."""
    files = [folder / "adapter_model.safetensors", folder / "adapter_model.bin"]
    path = next((f for f in files if f.is_file()), None)
    if path is None:
        raise UserError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors and no adapter_model.bin")
    pairs: dict[str, dict[str, LazyLeaf]] = {}
    for name, leaf in open_file(path).items():
        found = re.fullmatch(r"(.+)\.lora_([AB])(\.default)?\.weight", name)
        if found:
            pairs.setdefault(_base_name(found[1]), {})[found[2]] = leaf
        else:
            merged.faults.append(Fault("unknown", name, " (LoRA)"))
    return pairs


def _base_name(name: str) -> str:
    """PEFT's name -> the base's: without ``base_model.model.``, and with one "model." where it was doubled."""
    name = name.removeprefix("base_model.model.")
    while name.startswith(("model.model.", "model.lm_head.")):
        name = name.removeprefix("model.")
    return name


def _misfit(target: LazyLeaf | None, pair: dict[str, LazyLeaf], rank: int) -> str | None:
    if target is None:
        return "unknown"
    if set(pair) != {"A", "B"}:
        return "missing"
    if len(target.shape) != 2 or pair["A"].shape != (rank, target.shape[1]) or pair["B"].shape != (target.shape[0], rank):
        return "wrong shape"
    return None


def _reader(target: LazyLeaf, pair: dict[str, LazyLeaf], scale: float) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        a, b = (pair[x].read().astype(np.float32) for x in "AB")
        return (target.read().astype(np.float32) + np.float32(scale) * (b @ a)).astype(target.dtype)

    return read

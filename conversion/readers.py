"""Lazy readers: a folder of weights -> names and shapes now, values when asked for."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from conversion.names import VISION_PREFIX
from conversion.torchbin import open_bin
from lmm_jax.checkpoint import LazyLeaf
from lmm_jax.errors import UserError

_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Fault(NamedTuple):
    """Something wrong with one tensor; faults are gathered and reported together."""

    kind: str
    name: str
    detail: str = ""


@dataclasses.dataclass
class Tensors:
    """Tensors by name, and what was wrong while they were gathered."""

    leaves: dict[str, LazyLeaf] = dataclasses.field(default_factory=dict)
    faults: list[Fault] = dataclasses.field(default_factory=list)

    def add(self, name: str, leaf: LazyLeaf, origin: str) -> None:
        """Take in a tensor; a name that is there already is a fault."""
        if name in self.leaves:
            self.faults.append(Fault("duplicate", name, f" (again in {origin})"))
        self.leaves.setdefault(name, leaf)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: missing, not readable, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return data


def open_tensors(folder: Path) -> Tensors:
    """All tensors of a checkpoint folder, none of them read yet.

    Layouts, the first that is there wins: ``model.safetensors``, its index with shards, any ``*.safetensors``,
    ``pytorch_model.bin``, its index with shards, any ``pytorch_model-*.bin``.

    Raises:
      UserError: no weights, missing shards, or a truncated or damaged file.
    """
    tensors = Tensors()
    for path in _weight_files(folder):
        for name, leaf in open_file(path).items():
            tensors.add(name, leaf, path.name)
    return tensors


def open_file(path: Path) -> dict[str, LazyLeaf]:
    """The tensors of one ``.safetensors`` or ``.bin`` file, none of them read yet.

    Raises:
      UserError: truncated or damaged, or a dtype that NumPy does not have.
    """
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git-"):
            raise UserError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull` in its folder")
    return _open_safetensors(path) if path.suffix == ".safetensors" else open_bin(path)


def as_vision_tower(tensors: Tensors) -> Tensors:
    """The tensors of a CLIP of its own under the names they have inside a whole checkpoint.

    ``vision_model.*`` behind any prefix, or without it; other names stay as they are.
    """
    renamed = Tensors(faults=list(tensors.faults))
    for name, leaf in tensors.leaves.items():
        match = re.fullmatch(r"(?:.*\.)?vision_model\.(.+)|((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..+)", name)
        renamed.add(VISION_PREFIX + (match[1] or match[2]) if match else name, leaf, f"the vision encoder, as {name}")
    return renamed


def _weight_files(folder: Path) -> list[Path]:
    for single, many in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _shards(index)
        found = sorted(p for p in folder.glob(many) if not p.name.startswith("adapter_"))
        if found:
            return found
    raise UserError(f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or shards of them")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index} has no weight_map of tensor names to files")
    names = sorted(set(weight_map.values()))
    missing = [n for n in names if Path(n).name != n or not (index.parent / n).is_file()]
    if missing:
        raise UserError(f"{index} names {len(missing)} files that are not beside it: {shorten(missing)}")
    return [index.parent / n for n in names]


def _open_safetensors(path: Path) -> dict[str, LazyLeaf]:
    from safetensors import SafetensorError, safe_open

    leaves = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in _DTYPES:
                    raise UserError(f"{path}: {name} has dtype {tensor.get_dtype()}; fp16, bf16 and fp32 are supported")
                leaves[name] = _lazy(path, name, tuple(tensor.get_shape()), _DTYPES[tensor.get_dtype()])
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}): download it again") from error
    return leaves


def _lazy(path: Path, name: str, shape: tuple[int, ...], dtype: Any) -> LazyLeaf:
    def tensor(index: tuple[slice, ...] | None) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(
                path, framework="numpy"
            ) as file:  # opened anew each time: an open map keeps what was read in memory
                return file.get_tensor(name) if index is None else file.get_slice(name)[index]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read any more ({error}): did it change meanwhile?") from error

    return LazyLeaf(shape, np.dtype(dtype), lambda: tensor(None), tensor)


def shorten(names: Iterable[str], most: int = 8) -> str:
    """A list for a message: the first `most` names in order and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def listed(faults: Iterable[Fault]) -> str:
    """All kinds of faults with their number, and of each the first names."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault.name + fault.detail)
    return "; ".join(f"{kind} ({len(names)}): {shorten(names)}" for kind, names in sorted(kinds.items()))

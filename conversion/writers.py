"""Writing safetensors tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class Output(NamedTuple):
    """A tensor to write; ``read`` returns a contiguous array of exactly `shape` and `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def num_bytes(output: Output) -> int:
    """Bytes of a tensor."""
    return math.prod(output.shape) * output.dtype.itemsize


def plan_shards(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """Cuts the tensors, in order, into files of at most `limit` bytes (or one tensor)."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + num_bytes(output) > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += num_bytes(output)
    return shards


def write_safetensors(path: Path, outputs: Sequence[Output], advance: Callable[[int], object]) -> None:
    """Writes one file; one tensor at a time is in memory.

    The library's own writer wants all of them at once. The format: length of the header (8 bytes), the header (JSON, padded
    to 8 bytes), then the tensors without gaps, wider dtypes first so that all are aligned.

    Args:
      path: the new file.
      outputs: float16, bfloat16 or float32.
      advance: called with the bytes of each tensor that is written.
    """
    outputs = sorted(outputs, key=lambda o: -o.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        end = offset + num_bytes(output)
        header[output.name] = {"dtype": _DTYPES[output.dtype.name], "shape": output.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            file.write(output.read().reshape(-1).view(np.uint8).data)
            advance(num_bytes(output))


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copies files into a folder, names kept."""
    for file in files:
        shutil.copyfile(file, folder / file.name)

"""Read ``pytorch_model*.bin`` without torch, lazily, and without running what a pickle asks to run.

A ``.bin`` file is a zip archive: ``data.pkl`` describes the tensors, ``data/<key>`` holds the bytes of each storage,
uncompressed. The unpickler knows tensors and the containers around them; every other name in a pickle is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmm_jax.checkpoint import LazyLeaf
from lmm_jax.errors import UserError

_STORAGES = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "HalfStorage": np.float16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name and extra field


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Where the bytes of a storage are; `start` and `count` (elements) were checked against the file."""

    path: Path
    start: int
    count: int
    dtype: np.dtype


def open_bin(path: Path) -> dict[str, LazyLeaf]:
    """The tensors of a file that ``torch.save`` wrote (a flat dictionary of names to tensors), none of them read yet.

    Raises:
      UserError: no zip archive, truncated or damaged, written before torch 1.6, big-endian, or a pickle that asks for
        anything besides tensors.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(_not_a_zip(path))
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            tensors = _TensorUnpickler(path, archive, file).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is damaged and cannot be read as torch weights ({error}): download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(v, LazyLeaf) for k, v in tensors.items()):
        raise UserError(f"{path} holds something other than a flat dictionary of names to tensors")
    return dict(tensors)


def _not_a_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"{path} is truncated: download it again"
    if start[:1] == b"\x80":
        return f"{path} has the format of torch before 1.6: load and save it once with a newer torch"
    return f"{path} is not a file that torch wrote: download it again"


class _TensorUnpickler(pickle.Unpickler):
    """Builds `LazyLeaf` objects where torch would build tensors."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, file: Any) -> None:
        self._path, self._file = path, file
        self._members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} holds {len(pickles)} files data.pkl, expected one: it is not a file of torch weights")
        self._root = pickles[0].removesuffix("data.pkl")
        byteorder = self._root + "byteorder"
        if byteorder in self._members and archive.read(byteorder) != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")
        super().__init__(archive.open(pickles[0]))

    def find_class(self, module: str, name: str) -> Any:
        """The allow-list: every global of the pickle comes through here."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        raise UserError(f"{self._path} asks to run {module}.{name}, which weights have no need of: refused, do not trust it")

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: its place in the file, from the member's own header (the central one may differ in length)."""
        _kind, dtype, key, _device, count = pid
        info = self._members[f"{self._root}data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED or count < 0 or count * dtype.itemsize > info.file_size:
            raise ValueError(f"storage {key} does not hold {count} values of {dtype}")
        self._file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", self._file.read(_LOCAL_HEADER))
        start = info.header_offset + _LOCAL_HEADER + name_length + extra_length
        return _Storage(self._path, start, count, dtype)


def _rebuild_parameter(data: LazyLeaf, *_: Any) -> LazyLeaf:
    return data


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> LazyLeaf:
    """A view of a storage; reads only the span it covers."""
    if len(shape) != len(stride) or min((offset, *shape, *stride)) < 0:
        raise ValueError(f"a tensor with shape {shape} and strides {stride}")
    span = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride))
    if offset + span > storage.count:  # a crafted file could read other memory through its strides
        raise ValueError(f"a tensor of shape {shape} reaches outside its storage of {storage.count} values")
    dtype, start = storage.dtype, storage.start + offset * storage.dtype.itemsize

    def read() -> np.ndarray:
        flat = np.fromfile(storage.path, dtype, span, offset=start)
        if flat.size != span:
            raise UserError(f"{storage.path} is truncated: download it again")
        view = np.lib.stride_tricks.as_strided(flat, shape, [step * dtype.itemsize for step in stride])
        return view.copy()

    return LazyLeaf(tuple(shape), dtype, read)

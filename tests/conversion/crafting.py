"""Files that the tests make: checkpoints changed in one place, and torch's .bin format written without torch."""

import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lmm_jax.checkpoint import leaf_shapes, read_leaf

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("image_c1", "hd_c2", "llava_v1_5")
_STORAGE = {
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "bool": "BoolStorage",
}


# ------------------------------------------------------------------------------------------------------------- folders


def load(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder of safetensors."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def checkpoint(folder: Path, tensors: dict[str, np.ndarray], case: str = "image_c1", **config: object) -> Path:
    """A checkpoint beside its encoder: `folder`/hf (returned) and `folder`/clip, config.json changed by `config`."""
    hf = folder / "hf"
    hf.mkdir(parents=True)
    shutil.copytree(GOLDEN / case / "clip", folder / "clip", dirs_exist_ok=True)
    write_config(hf, case, **config)
    if tensors:
        save_file(tensors, hf / "model.safetensors")
    return hf


def write_config(folder: Path, case: str = "image_c1", **config: object) -> None:
    data = json.loads((GOLDEN / case / "hf" / "config.json").read_text()) | config
    data = {key: value for key, value in data.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(data))


def leaves(folder: Path | str) -> dict[str, np.ndarray]:
    """Every leaf of a model folder."""
    return {name: read_leaf(folder, name) for name in leaf_shapes(folder)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal names, shapes, dtypes and bytes."""
    return a.keys() == b.keys() and all(
        (a[k].shape, a[k].dtype, a[k].tobytes()) == (b[k].shape, b[k].dtype, b[k].tobytes()) for k in a
    )


# ------------------------------------------------------------------------------------------------------ torch's .bin


class Pickle:
    """The opcodes that torch.save writes, as bytes."""

    @staticmethod
    def name(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    @staticmethod
    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()

    @staticmethod
    def number(value: int) -> bytes:
        return pickle.LONG1 + bytes([9]) + value.to_bytes(9, "little", signed=True)

    @classmethod
    def numbers(cls, values: tuple[int, ...]) -> bytes:
        return pickle.MARK + b"".join(map(cls.number, values)) + pickle.TUPLE

    @staticmethod
    def call(function: bytes, *args: bytes) -> bytes:
        return function + pickle.MARK + b"".join(args) + pickle.TUPLE + pickle.REDUCE

    @classmethod
    def storage(cls, key: str, dtype: str, count: int) -> bytes:
        parts = cls.text("storage"), cls.name("torch", _STORAGE[dtype]), cls.text(key), cls.text("cpu"), cls.number(count)
        return pickle.MARK + b"".join(parts) + pickle.TUPLE + pickle.BINPERSID

    @classmethod
    def tensor(cls, storage: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        hooks = cls.call(cls.name("collections", "OrderedDict"))
        args = storage, cls.number(offset), cls.numbers(shape), cls.numbers(stride), pickle.NEWFALSE, hooks
        return cls.call(cls.name("torch._utils", "_rebuild_tensor_v2"), *args)

    @classmethod
    def dictionary(cls, items: dict[str, bytes]) -> bytes:
        pairs = b"".join(cls.text(key) + value for key, value in items.items())
        return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS + pickle.STOP


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def write_bin(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """What torch.save writes for a dictionary of contiguous tensors."""
    items = {
        name: Pickle.tensor(Pickle.storage(str(i), a.dtype.name, a.size), 0, a.shape, strides(a.shape))
        for i, (name, a) in enumerate(tensors.items())
    }
    write_archive(path, Pickle.dictionary(items), [a.tobytes() for a in tensors.values()])


def write_archive(path: Path, data_pkl: bytes, storages: list[bytes], byteorder: bytes = b"little") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", byteorder)
        for i, data in enumerate(storages):
            info = zipfile.ZipInfo(f"archive/data/{i}")
            info.extra = b"FB" + struct.pack("<H", 5 + i) + b"Z" * (5 + i)  # torch pads members to align them
            archive.writestr(info, data)
        archive.writestr("archive/version", b"3\n")

import pickle

import ml_dtypes
import numpy as np
import pytest
from crafting import Pickle, strides, write_archive, write_bin

from conversion.torchbin import open_bin
from lmm_jax.errors import UserError

RNG = np.random.default_rng(0)


def read(path):
    return {name: leaf.read() for name, leaf in open_bin(path).items()}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, "float16", "float32", "float64", "int64", "int32", "bool"])
def test_reads_what_torch_writes(tmp_path, dtype):
    arrays = {"a.weight": RNG.standard_normal((3, 4)).astype(dtype), "b": np.ones((), dtype), "c": np.zeros((0, 2), dtype)}
    write_bin(tmp_path / "x.bin", arrays)
    leaves = open_bin(tmp_path / "x.bin")
    for name, array in arrays.items():
        got = leaves[name].read()
        assert (leaves[name].shape, leaves[name].dtype) == (got.shape, got.dtype) == (array.shape, array.dtype)
        assert got.tobytes() == array.tobytes()


def test_views_tied_tensors_and_parameters(tmp_path):
    values = np.arange(24, dtype=np.float32)
    storage = Pickle.storage("0", "float32", 24)
    view = Pickle.tensor(storage, 4, (3, 2), (2, 5))
    parameter = Pickle.call(Pickle.name("torch._utils", "_rebuild_parameter"), view, pickle.NEWTRUE, pickle.NONE)
    whole = Pickle.tensor(storage, 0, (4, 6), (6, 1))
    write_archive(tmp_path / "x.bin", Pickle.dictionary({"view": parameter, "a": whole, "b": whole}), [values.tobytes()])
    got = read(tmp_path / "x.bin")
    assert got["view"].tolist() == [[4, 9], [6, 11], [8, 13]]
    assert got["a"].tolist() == got["b"].tolist() == values.reshape(4, 6).tolist()


def test_a_state_dict_with_its_metadata(tmp_path):
    """torch.save(model.state_dict()): an OrderedDict with an attribute."""
    empty = Pickle.call(Pickle.name("collections", "OrderedDict"))
    tensor = Pickle.tensor(Pickle.storage("0", "float32", 2), 0, (2,), (1,))
    items = pickle.MARK + Pickle.text("a") + tensor + pickle.SETITEMS
    metadata = pickle.EMPTY_DICT + pickle.MARK + Pickle.text("_metadata") + empty + pickle.SETITEMS
    data = pickle.PROTO + b"\x02" + empty + items + metadata + pickle.BUILD + pickle.STOP
    write_archive(tmp_path / "x.bin", data, [np.array([1, 2], np.float32).tobytes()])
    assert read(tmp_path / "x.bin")["a"].tolist() == [1, 2]


@pytest.mark.parametrize("module, name", [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("collections", "deque")])
def test_a_malicious_pickle_is_refused(tmp_path, module, name):
    marker = tmp_path / "ran"
    attack = Pickle.call(Pickle.name(module, name), Pickle.text(f"touch {marker}"))
    write_archive(tmp_path / "x.bin", Pickle.dictionary({"a": attack}), [])
    with pytest.raises(UserError, match=rf"{module}\.{name}.*refused"):
        open_bin(tmp_path / "x.bin")
    assert not marker.exists()


@pytest.mark.parametrize(
    "offset, shape, stride, count",
    [
        (0, (5,), (1,), 4),
        (2, (3,), (1,), 4),
        (0, (2, 2), (100, 1), 4),
        (-1, (2,), (1,), 4),
        (3, (2,), (-1,), 4),
        (0, (4,), (1, 1), 4),
        (0, (9,), (1,), 9),
    ],
)
def test_a_tensor_cannot_reach_outside_its_storage(tmp_path, offset, shape, stride, count):
    tensor = Pickle.tensor(Pickle.storage("0", "float32", count), offset, shape, stride)
    write_archive(tmp_path / "x.bin", Pickle.dictionary({"a": tensor}), [bytes(16)])
    with pytest.raises(UserError, match="damaged"):
        open_bin(tmp_path / "x.bin")


def test_truncated_legacy_and_other_files(tmp_path):
    path = tmp_path / "x.bin"
    write_bin(path, {"a": np.ones((100, 100), np.float32)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        open_bin(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    with pytest.raises(UserError, match="torch before 1.6"):
        open_bin(path)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="not a file that torch wrote"):
        open_bin(path)


def test_damaged_and_strange_archives(tmp_path):
    path = tmp_path / "x.bin"
    tensor = Pickle.tensor(Pickle.storage("0", "float32", 4), 0, (4,), strides((4,)))
    good = Pickle.dictionary({"a": tensor})
    write_archive(path, good[:-20], [bytes(16)])
    with pytest.raises(UserError, match="damaged"):
        open_bin(path)
    write_archive(path, good, [])
    with pytest.raises(UserError, match="damaged"):
        open_bin(path)
    write_archive(path, good, [bytes(16)], byteorder=b"big")
    with pytest.raises(UserError, match="big-endian"):
        open_bin(path)
    write_archive(path, Pickle.dictionary({"a": Pickle.text("no tensor")}), [])
    with pytest.raises(UserError, match="flat dictionary"):
        open_bin(path)

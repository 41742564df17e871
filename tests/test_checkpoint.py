"""Model folders: what is written is read on any mesh, every device reads its own part, damage is noticed."""

import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmm_jax import checkpoint_io, checkpoint_mesh
from lmm_jax.checkpoint import disk_names, leaf_shapes, load_params, read_config, read_leaf, unstack, write_model
from lmm_jax.config import named_sizes
from lmm_jax.errors import UserError
from lmm_jax.sharding import leaf_paths

CONFIG = named_sizes()["tiny"]  # 3 CLIP blocks, so the export-only one is number 2
BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {
    "embed_tokens/embedding": (96, 64),
    "layers/stack/self_attn/q_proj/kernel": (3, 64, 8, 16),
    "layers/stack/input_layernorm/scale": (3, 64),
    "layers/last/self_attn/q_proj/kernel": (64, 8, 16),
    "layers/last/input_layernorm/scale": (64,),
    "prefusion_layers/last/mlp/up_proj/kernel": (64, 128),
    "vision_tower/layers/stack/mlp/fc1/bias": (2, 40),
    "norm/scale": (64,),
}
AXES = {  # of the leaf in one layer, as in lmm_jax.sharding
    "embed_tokens/embedding": ("tensor", "fsdp"),
    "layers/stack/self_attn/q_proj/kernel": (None, "fsdp", "tensor"),
    "layers/last/self_attn/q_proj/kernel": ("fsdp", "tensor"),
    "prefusion_layers/last/mlp/up_proj/kernel": ("fsdp", "tensor"),
}
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the only system where files are read directly")
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


class Stop(Exception):
    pass


def nest(flat):
    tree = {}
    for path, leaf in flat.items():
        *heads, tail = path.split("/")
        node = tree
        for key in heads:
            node = node.setdefault(key, {})
        node[tail] = leaf
    return tree


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return nest({path: rng.normal(size=shape).astype(dtype) for path, shape in SHAPES.items()})


def make_mesh(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def make_abstract(mesh_shape=(1, 1, 1), dtype=np.float32, shapes=SHAPES):
    mesh = make_mesh(mesh_shape)
    return nest(
        {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*AXES.get(path, ()))))
            for path, shape in shapes.items()
        }
    )


def same(got, want):
    got, want = leaf_paths(got), leaf_paths(want)
    assert got.keys() == want.keys()
    for path in want:
        assert got[path].dtype == want[path].dtype and np.asarray(got[path]).tobytes() == want[path].tobytes(), path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models" / "small"


@pytest.fixture
def written(folder):
    write_model(folder, CONFIG, unstack(make_params()))
    return folder


# ------------------------------------------------------------------------------------------------------- names and values


def test_names_on_disk():
    names = disk_names(nest({path: np.zeros(shape) for path, shape in SHAPES.items()}))
    assert names == {
        "embed_tokens/embedding": ("embed_tokens.embedding",),
        "layers/stack/self_attn/q_proj/kernel": tuple(f"layers.{i}.self_attn.q_proj.kernel" for i in range(3)),
        "layers/stack/input_layernorm/scale": tuple(f"layers.{i}.input_layernorm.scale" for i in range(3)),
        "layers/last/self_attn/q_proj/kernel": ("layers.3.self_attn.q_proj.kernel",),
        "layers/last/input_layernorm/scale": ("layers.3.input_layernorm.scale",),
        "prefusion_layers/last/mlp/up_proj/kernel": ("prefusion_layers.0.mlp.up_proj.kernel",),
        "vision_tower/layers/stack/mlp/fc1/bias": ("vision_tower.layers.0.mlp.fc1.bias", "vision_tower.layers.1.mlp.fc1.bias"),
        "norm/scale": ("norm.scale",),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("piece_bytes", [2**26, 1])
def test_round_trip(folder, monkeypatch, mesh_shape, dtype, piece_bytes):
    monkeypatch.setattr(checkpoint_io, "CHUNK_BYTES", 1024)  # several chunks per leaf
    monkeypatch.setattr(checkpoint_mesh, "PIECE_BYTES", piece_bytes)
    params = make_params(dtype)
    write_model(folder, CONFIG, unstack(params))
    assert read_config(folder) == CONFIG
    abstract = make_abstract(mesh_shape, dtype)
    loaded = load_params(folder, abstract)
    same(loaded, params)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(abstract)):
        assert got.sharding == want.sharding
    again = folder.with_name("again")
    write_model(again, CONFIG, unstack(loaded))  # from sharded device arrays
    same(load_params(again, make_abstract(dtype=dtype)), params)


@pytest.mark.parametrize("ahead", [0, 2**30])
def test_layers_are_read_apart(written, monkeypatch, ahead):
    monkeypatch.setattr(checkpoint_mesh, "ahead_bytes", lambda total: ahead)
    seen = []
    loaded = load_params(
        written, make_abstract(), layers_apart=True, each=lambda path, leaf: seen.append(path) or {"of": leaf}
    )
    want = leaf_paths(make_params())
    assert len(seen) == sum(len(names) for names in disk_names(make_params()).values())
    got = loaded["layers"]["stack"]["self_attn"]["q_proj"]["kernel"]
    assert isinstance(got, tuple) and len(got) == 3
    for layer, expected in zip(got, want["layers/stack/self_attn/q_proj/kernel"]):
        assert np.array_equal(layer["of"], expected)
    assert np.array_equal(loaded["norm"]["scale"]["of"], want["norm/scale"])


def test_what_is_replaced_is_gone_before_the_next_is_read(written, monkeypatch):
    monkeypatch.setattr(checkpoint_mesh, "ahead_bytes", lambda total: 0)
    allocate, taken = checkpoint_io.aligned_memory, []

    def allocating(*args):
        for _ in range(100):  # TensorStore lets go of it some time after the last byte has come
            if left := [1 for memory in taken if memory() is not None]:
                time.sleep(0.01)
        assert not left
        array = allocate(*args)
        taken.append(weakref.ref(array.base))
        return array

    monkeypatch.setattr(checkpoint_io, "aligned_memory", allocating)
    load_params(written, make_abstract(), each=lambda path, leaf: np.float32(0))
    assert len(taken) == len(SHAPES)


def test_stored_leaves(written):
    params = leaf_paths(make_params())
    stored = leaf_shapes(written)
    assert stored["layers.1.self_attn.q_proj.kernel"] == ((64, 8, 16), np.dtype(np.float32))
    assert set(stored) == {name for names in disk_names(make_params()).values() for name in names}
    want = params["layers/stack/self_attn/q_proj/kernel"][1]
    assert np.array_equal(read_leaf(written, "layers.1.self_attn.q_proj.kernel"), want)


def test_casts(written):
    want = jax.tree.map(lambda x: x.astype(BF16), make_params())
    same(load_params(written, make_abstract(dtype=BF16)), want)
    same(load_params(written, make_abstract(), dtype=BF16), want)


def test_zeros_scalars_and_strided_leaves(folder):
    leaves = {"zero": np.zeros((3, 5), BF16), "scalar": np.array(2.5, np.float32), "strided": np.arange(12.0).reshape(3, 4).T}
    write_model(folder, CONFIG, leaves)
    for name, leaf in leaves.items():
        assert np.array_equal(read_leaf(folder, name), leaf) and leaf_shapes(folder)[name] == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("shape", [(4096, 14336), (32, 128, 4096), (128256, 4096), (32003, 4095), (7,), ()])
def test_chunks_are_small_and_split_every_long_axis(shape):
    chunk = checkpoint_io.chunk_shape(shape, 2)
    assert np.prod(chunk, dtype=int) * 2 <= checkpoint_io.CHUNK_BYTES
    assert np.prod(shape, dtype=int) * 2 <= checkpoint_io.CHUNK_BYTES or all(c < n for c, n in zip(chunk, shape))


def bytes_read():
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("piece_bytes", [2**26, 2**15])  # an array; a few of its rows of chunks
def test_a_process_reads_every_byte_once(folder, monkeypatch, mesh_shape, piece_bytes):
    monkeypatch.setattr(checkpoint_io, "CHUNK_BYTES", 2**14)  # 64 chunks of a megabyte
    monkeypatch.setattr(checkpoint_mesh, "PIECE_BYTES", piece_bytes)
    shapes = {"embed_tokens/embedding": (512, 512), "layers/stack/norm/scale": (4, 2000), "layers/last/norm/scale": (2000,)}
    write_model(folder, CONFIG, unstack(nest({path: np.ones(shape, np.float32) for path, shape in shapes.items()})))
    before = bytes_read()
    load_params(folder, make_abstract(mesh_shape, shapes=shapes))
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    assert total <= bytes_read() - before < 1.1 * total


def test_a_slice_reads_its_own_bytes(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "CHUNK_BYTES", 2**14)
    array = np.arange(512 * 512, dtype=np.float32).reshape(512, 512)
    write_model(folder, CONFIG, {"a": array})
    store = checkpoint_io.open_arrays(folder / "params")["a"]
    before = bytes_read()
    got = checkpoint_io.aligned_memory((64, 512), array.dtype)
    checkpoint_io.start_reading(store, (slice(64, 128), slice(0, 512)), got).result()
    assert np.array_equal(got, array[64:128]) and got.ctypes.data % 64 == 0
    assert bytes_read() - before < 1.1 * array.nbytes / 8


@ON_LINUX
@pytest.mark.parametrize("share, chosen", [(0.5, "direct"), (1.0, "memmap")])
def test_files_stay_out_of_memory_that_is_too_small(written, monkeypatch, share, chosen):
    """Of what the arrays take as float32, `share` is left beside the files, which hold them as such, too."""
    files = sum(file.stat().st_size for file in (written / "params").rglob("*") if file.is_file())
    arrays = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    monkeypatch.setattr(checkpoint_io, "_available_bytes", lambda: files + share * arrays)
    ways, context = [], checkpoint_io._context
    monkeypatch.setattr(checkpoint_io, "_context", lambda reading: ways.append(reading) or context(reading))
    same(load_params(written, make_abstract()), make_params())
    assert [way["file_io_mode"]["mode"] for way in ways] == [chosen]
    same(load_params(written, make_abstract(), dtype=BF16), jax.tree.map(lambda x: x.astype(BF16), make_params()))
    assert ways[1]["file_io_mode"]["mode"] == "memmap"  # half as much in memory


@ON_LINUX
def test_where_direct_reading_is_refused(written, monkeypatch):
    opening = os.open

    def refusing(path, flags, *args, **how):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opening(path, flags, *args, **how)

    monkeypatch.setattr(checkpoint_io, "_available_bytes", lambda: 0)
    assert checkpoint_io._way_of_reading(written / "params", 0) is checkpoint_io._DIRECT
    monkeypatch.setattr(checkpoint_io.os, "open", refusing)
    assert checkpoint_io._way_of_reading(written / "params", 0) is checkpoint_io._MAPPED
    same(load_params(written, make_abstract()), make_params())


@ON_LINUX
def test_available_memory_is_what_the_system_says():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < checkpoint_io._available_bytes() <= total


@ON_LINUX
@pytest.mark.parametrize("limit, left", [("1000000", 600_000), ("max", None)])
def test_a_container_has_less_memory(tmp_path, limit, left):
    for name, text in {"max": limit, "current": "500000", "stat": "anon 400000\nfile 100000\nfile_mapped 5"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    found = checkpoint_io._available_bytes(tmp_path)
    assert found == left if left else found > 2**20


def test_an_error_of_who_is_given_arrays_ends_the_reading(written, monkeypatch):
    monkeypatch.setattr(checkpoint_mesh, "PIECE_BYTES", 1)

    def failing(path, leaf):
        raise Stop(path)

    with pytest.raises(Stop, match="embed_tokens/embedding"):
        load_params(written, make_abstract(), each=failing)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


@pytest.mark.parametrize("whole", [False, True])
def test_scalars_and_stacks_of_them(folder, whole):
    params = {"gain": np.array(3, np.float32), "layers": {"stack": {"gain": np.arange(2.0, dtype=np.float32)}}}
    params["layers"]["last"] = {"gain": np.array(7, np.float32)}
    write_model(folder, CONFIG, unstack(params))
    abstract = make_abstract(shapes={path: leaf.shape for path, leaf in leaf_paths(params).items()})
    loaded = load_params(folder, abstract, whole=whole)
    assert loaded["gain"] == 3 and loaded["layers"]["last"]["gain"] == 7
    assert loaded["layers"]["stack"]["gain"].tolist() == ([0, 1, 7] if whole else [0, 1])


def test_orbax_restores_it(written):
    import orbax.checkpoint as ocp

    want = {name: read_leaf(written, name) for name in leaf_shapes(written)}
    restored = ocp.PyTreeCheckpointer().restore(written / "params")
    got = {path.replace("/", "."): leaf for path, leaf in leaf_paths(restored).items()}
    assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)
    # and its own index of such a tree is the one written here
    ocp.PyTreeCheckpointer(use_zarr3=True).save(written.with_name("orbax"), restored)
    ours, theirs = (json.loads((p / "_METADATA").read_text()) for p in (written / "params", written.with_name("orbax")))
    assert ours == theirs


def test_loading_does_not_import_orbax():
    code = "import sys, lmm_jax.checkpoint; assert not any(m.startswith('orbax') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------------- bad folders


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "truncate":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("left", [0, 2**40])
def test_damage_to_any_data_file_is_noticed(written, monkeypatch, how, left):
    monkeypatch.setattr(checkpoint_io, "_available_bytes", lambda: left)
    files = [path for path in (written / "params").rglob("*") if path.is_file() and path.name != "_METADATA"]
    noticed = 0
    for path in files:
        data = path.read_bytes()
        damage(path, how)
        try:
            loaded = load_params(written, make_abstract((1, 8, 1)))
        except UserError as error:
            assert "again" in str(error) and "tensorstore_spec" not in str(error) and "\n" not in str(error)
            noticed += 1
        else:  # a file that only an earlier state of the index referred to
            same(loaded, make_params())
            assert len(data) < 4096
        path.write_bytes(data)
    assert noticed >= 2
    same(load_params(written, make_abstract()), make_params())


def test_a_damaged_leaf_is_noticed_by_read_leaf(written):
    for path in (written / "params" / "d").iterdir():
        damage(path, "flip")
    with pytest.raises(UserError, match="damaged"):
        for name in leaf_shapes(written):
            read_leaf(written, name)


def test_leaves_that_do_not_fit_are_all_listed(folder):
    leaves = unstack(make_params())
    del leaves["layers.1.self_attn.q_proj.kernel"], leaves["norm.scale"]
    leaves["embed_tokens.embedding"] = np.zeros((96, 63), np.float32)
    leaves["layers.4.input_layernorm.scale"] = np.zeros(64, np.float32)
    leaves["vision_tower.layers.2.mlp.fc1.bias"] = np.zeros(40, np.float32)  # export only
    write_model(folder, CONFIG, leaves)
    with pytest.raises(UserError) as error:
        load_params(folder, make_abstract())
    faults = set(str(error.value).partition("do not fit the model: ")[2].split("; "))
    assert faults == {
        "layers.1.self_attn.q_proj.kernel is missing",
        "norm.scale is missing",
        "embed_tokens.embedding has shape (96, 63), not (96, 64)",
        "layers.4.input_layernorm.scale is unknown to the model",
    }


def test_export_only_leaves_are_no_fault(folder):
    extra = itertools.product(["vision_tower.layers.2.layer_norm1.scale", "vision_tower.post_layernorm.bias"], [np.ones(4)])
    write_model(folder, CONFIG, unstack(make_params()) | dict(extra))
    same(load_params(folder, make_abstract()), make_params())


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model("model", CONFIG, unstack(make_params()))
    same(load_params(Path("model"), make_abstract()), make_params())
    assert len(leaf_shapes("model")) == 13

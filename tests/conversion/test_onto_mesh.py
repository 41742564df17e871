"""A checkpoint straight onto a mesh: the same parameters as by way of a model folder, each slice read alone."""

import shutil

import jax
import numpy as np
import pytest
from crafting import CASES, GOLDEN, write_bin
from safetensors.numpy import load_file, save_file

from conversion import readers
from conversion.from_hf import Options, from_hf, open_checkpoint
from conversion.matching import match
from conversion.names import table
from conversion.onto_mesh import onto_mesh
from lmm_jax import checkpoint
from lmm_jax.checkpoint import place_leaves
from lmm_jax.config import named_sizes
from lmm_jax.errors import UserError
from lmm_jax.models.llava_mini import abstract_params
from lmm_jax.sharding import leaf_paths, make_mesh

QUIET = Options(report=lambda line: None)
MESHES = ("data=1", "fsdp=8", "data=2,fsdp=2,tensor=2")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_as_by_way_of_a_model_folder(case, mesh, tmp_path):
    hf, mesh = str(GOLDEN / case / "hf"), make_mesh(mesh)
    from_hf(hf, str(tmp_path / "model"), QUIET)
    config, params = onto_mesh(hf, mesh, QUIET, dtype="float32")
    assert config == checkpoint.read_config(tmp_path / "model")
    abstract = abstract_params(config, mesh, "float32")
    expected = leaf_paths(checkpoint.load_params(tmp_path / "model", abstract))
    got = leaf_paths(params)
    assert got.keys() == expected.keys()
    for path, leaf in got.items():
        assert leaf.sharding == expected[path].sharding and leaf.dtype == expected[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(expected[path]).tobytes(), path


@pytest.mark.parametrize("size", ["tiny", "tiny-hd"])
def test_a_device_reads_its_own_slices(size):
    config = named_sizes()[size]
    rng, entries = np.random.default_rng(0), table(config)
    arrays = {entry.tensor: rng.standard_normal(entry.shape, np.float32) for entry in entries}
    whole = {name: entry.leaf(i, arrays[entry.tensor]) for entry in entries for i, (name, _) in enumerate(entry.leaves)}
    read = []

    def lazy(name, array):
        def part(index):
            read.append(array[index].size)
            return array[index]

        def all_of_it():
            assert "patch_embedding" in name, name
            return array

        return checkpoint.LazyLeaf(array.shape, array.dtype, all_of_it, part)

    tensors = readers.Tensors({name: lazy(name, array) for name, array in arrays.items()})
    leaves, _ = match(entries, tensors, (), "a test")
    abstract = abstract_params(config, make_mesh("fsdp=2,tensor=4"))
    names = checkpoint.disk_names(abstract)
    for path, leaf in leaf_paths(abstract).items():
        index = leaf.sharding.devices_indices_map(leaf.shape)[jax.devices()[5]]
        index = tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, leaf.shape))
        index = index[1:] if "/stack/" in path else index
        for name in names[path]:
            read.clear()
            got = leaves[name].take(index)
            assert got.tobytes() == np.ascontiguousarray(whole[name][index]).tobytes(), name
            assert sum(read) in (got.size, 0), name


def test_parts_of_heads_are_read_whole():
    """No mesh cuts them so; what cannot be one slice of the tensor is still right."""
    entry = next(e for e in table(named_sizes()["tiny"]) if e.tensor == "model.layers.0.self_attn.q_proj.weight")
    array = np.random.default_rng(0).standard_normal(entry.shape, np.float32)
    tensors = readers.Tensors({entry.tensor: checkpoint.LazyLeaf(array.shape, array.dtype, lambda: array, lambda i: array[i])})
    leaves, _ = match([entry], tensors, (), "a test")
    (name, shape), *_ = entry.leaves
    index = (slice(0, shape[0]), slice(0, shape[1]), slice(1, 3))
    assert leaves[name].take(index).tobytes() == np.ascontiguousarray(entry.leaf(0, array)[index]).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(GOLDEN / "image_c1" / "hf", hf)
    file = hf / "model.safetensors"
    tensors = {name: array.astype(dtype) for name, array in load_file(file).items()}
    save_file(tensors, file)
    vision, mesh = str(GOLDEN / "image_c1" / "clip"), make_mesh("fsdp=2,tensor=2")
    from_hf(str(hf), str(tmp_path / "model"), QUIET, vision=vision)
    config, got = onto_mesh(str(hf), mesh, QUIET, vision=vision, dtype="float32")
    expected = checkpoint.load_params(tmp_path / "model", abstract_params(config, mesh, "float32"))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), got, expected)))


def test_a_file_that_goes_away(tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(GOLDEN / "image_c1" / "hf", hf)
    opened = open_checkpoint(str(hf), QUIET, vision=str(GOLDEN / "image_c1" / "clip"))
    (hf / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors cannot be read any more"):
        place_leaves(opened.leaves, abstract_params(opened.config, make_mesh(), "float32"))


def test_the_template_is_taken(tmp_path):
    options = Options(report=lambda line: None, template="plain")
    assert onto_mesh(str(GOLDEN / "image_c1/hf"), make_mesh(), options)[0].template == "plain"


def test_torch_files_are_read_too(tmp_path):
    source, hf = GOLDEN / "image_c1" / "hf", tmp_path / "hf"
    hf.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (hf / file.name).symlink_to(file)
    write_bin(hf / "pytorch_model.bin", load_file(source / "model.safetensors"))
    vision = str(GOLDEN / "image_c1" / "clip")
    _, got = onto_mesh(str(hf), make_mesh("fsdp=4"), QUIET, vision=vision)
    _, expected = onto_mesh(str(source), make_mesh("fsdp=4"), QUIET, vision=vision)
    same_bits = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), got, expected)
    assert all(jax.tree.leaves(same_bits))

import json
import shutil

import numpy as np
import pytest
from crafting import GOLDEN, load, same, write_bin
from safetensors.numpy import save_file

from conversion.names import VISION_PREFIX
from conversion.readers import as_vision_tower, open_file, open_tensors, read_json
from lmm_jax.errors import UserError

A, B = {"a": np.ones((2, 3), np.float32)}, {"b": np.zeros((4,), np.float16)}


def read(folder):
    return {name: leaf.read() for name, leaf in open_tensors(folder).leaves.items()}


def index(folder, name, weight_map):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("layout", ["one", "indexed", "any"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_layouts(tmp_path, layout, kind):
    save, stem = (save_file, "model") if kind == "safetensors" else ((lambda t, p: write_bin(p, t)), "pytorch_model")
    if layout == "one":
        save(A | B, tmp_path / f"{stem}.{kind}")
    else:
        save(A, tmp_path / f"{stem}-00001-of-00002.{kind}")
        save(B, tmp_path / f"{stem}-00002-of-00002.{kind}")
    if layout == "indexed":
        files = {"a": f"{stem}-00001-of-00002.{kind}", "b": f"{stem}-00002-of-00002.{kind}"}
        index(tmp_path, f"{stem}.{kind}.index.json", files)
        save({"stale": A["a"]}, tmp_path / f"{stem}-00003-of-00003.{kind}")
    assert same(read(tmp_path), A | B)


def test_safetensors_win_and_other_bin_files_are_not_weights(tmp_path):
    save_file(A, tmp_path / "model.safetensors")
    write_bin(tmp_path / "pytorch_model.bin", B)
    assert same(read(tmp_path), A)
    (tmp_path / "model.safetensors").unlink()
    write_bin(tmp_path / "mm_projector.bin", A)
    assert same(read(tmp_path), B)


def test_a_tensor_in_two_shards_is_a_fault(tmp_path):
    save_file(A, tmp_path / "x.safetensors")
    save_file(A | B, tmp_path / "y.safetensors")
    assert open_tensors(tmp_path).faults == [("duplicate", "a", " (again in y.safetensors)")]


def test_missing_shards_and_broken_indices(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    index(tmp_path, path.name, {"a": "one.safetensors", "b": "../two.safetensors"})
    with pytest.raises(UserError, match=r"2 files that are not beside it: \.\./two.safetensors, one.safetensors"):
        open_tensors(tmp_path)
    for text, message in (
        ("{", "JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            open_tensors(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match="holds no weights"):
        open_tensors(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("cut", [4, 100, -10])
def test_truncated_safetensors(tmp_path, cut):
    shutil.copy(GOLDEN / "image_c1/clip/model.safetensors", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated or damaged"):
        open_tensors(tmp_path)


def test_corrupt_headers(tmp_path):
    path = tmp_path / "model.safetensors"
    for start in (b"\xff" * 8, (10).to_bytes(8, "little") + b"{broken...", b"<html>404 not found</html>"):
        path.write_bytes(start + bytes(64))
        with pytest.raises(UserError, match="truncated or damaged"):
            open_tensors(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match="git lfs pull"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("prefix", ["vision_model.", "", "vision_tower.vision_model.", "clip.vision_model."])
def test_names_of_a_clip_of_its_own(prefix):
    clip = open_file(GOLDEN / "image_c1/clip/model.safetensors")
    tensors = open_tensors(GOLDEN / "image_c1/clip")
    tensors.leaves = {name.replace("vision_model.", prefix): leaf for name, leaf in clip.items()} | {"logit_scale": None}
    inside = {name for name in load(GOLDEN / "image_c1/hf") if name.startswith(VISION_PREFIX)}
    assert as_vision_tower(tensors).leaves.keys() == inside | {"logit_scale"}


def test_a_clip_that_holds_a_tensor_under_two_names():
    tensors = open_tensors(GOLDEN / "image_c1/clip")
    tensors.leaves["pre_layrnorm.bias"] = tensors.leaves["vision_model.pre_layrnorm.bias"]
    (fault,) = as_vision_tower(tensors).faults
    assert fault[:2] == ("duplicate", VISION_PREFIX + "pre_layrnorm.bias")

"""What is said of folders that are no model folders."""

import json

import pytest

from lmm_jax.checkpoint import load_params, read_config, to_json
from lmm_jax.config import named_sizes
from lmm_jax.errors import UserError

CONFIG = to_json(named_sizes()["tiny"])


def put(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "is empty"),
        ({"readme__txt": ""}, "has no config.json"),
        ({"config__json": '{"model_type": "llava_mini"}'}, "run `python -m conversion from-hf {} DST`"),
        ({"model__safetensors": ""}, "run `python -m conversion from-hf {} DST`"),
        ({"pytorch_model-1__bin": ""}, "run `python -m conversion from-hf {} DST`"),
        ({"config__json": '{"format": "lmm-jax", '}, "cannot be read"),
        ({"config__json": "[]"}, "does not hold an object"),
        ({"config__json": '{"format": "lmm-jax", "version": 1}'}, "missing fields"),
        ({"config__json": '{"format": "lmm-jax", "version": 99}'}, "version 99"),
        ({"config__json": json.dumps(CONFIG)}, "no parameters"),
        ({"config__json": json.dumps(CONFIG | {"resolution_ratio": "two"})}, "is broken"),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, message):
    folder = put(tmp_path / "given", **files)
    for use in (read_config, lambda path: load_params(path, {})):
        with pytest.raises(UserError) as error:
            use(folder)
        assert message.format(folder) in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        read_config(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        read_config(str(tmp_path / "file"))

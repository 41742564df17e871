import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from crafting import CASES, GOLDEN, checkpoint, leaves, load, same
from safetensors import safe_open

from conversion.from_hf import Options, from_hf
from conversion.names import HEAD
from conversion.to_hf import to_hf
from lmm_jax.checkpoint import leaf_shapes, read_config, write_model
from lmm_jax.errors import UserError

QUIET = Options(report=lambda line: None)


def round_trip(hf, tmp_path, **arguments):
    from_hf(str(hf), str(tmp_path / "model"), QUIET)
    to_hf(str(tmp_path / "model"), str(tmp_path / "back"), report=lambda line: None, **arguments)
    return tmp_path / "back"


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_identical(tmp_path, case):
    back = round_trip(GOLDEN / case / "hf", tmp_path)
    assert same(load(back), load(GOLDEN / case / "hf"))
    assert [p.name for p in back.glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(back / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    given, written = (json.loads((f / "config.json").read_text()) for f in (GOLDEN / case / "hf", back))
    assert {k: v for k, v in written.items() if given[k] != v} == {"mm_vision_tower": "vision_tower"}
    assert same(load(back / "vision_tower"), load(GOLDEN / case / "clip"))


def test_mixed_dtypes_there_and_back(tmp_path):
    dtypes = [np.float16, ml_dtypes.bfloat16, np.float32]
    tensors = {n: t.astype(dtypes[i % 3]) for i, (n, t) in enumerate(load(GOLDEN / "hd_c2/hf").items())}
    back = round_trip(checkpoint(tmp_path, tensors, "hd_c2"), tmp_path)
    assert same(load(back), tensors)


def test_the_export_converts_again(tmp_path):
    """The vision encoder's folder, that mm_vision_tower names relative to the checkpoint, is read too."""
    back = round_trip(GOLDEN / "image_c1/hf", tmp_path)
    from_hf(str(back), str(tmp_path / "again"), QUIET)
    assert read_config(tmp_path / "again") == read_config(tmp_path / "model")
    assert same(leaves(tmp_path / "again"), leaves(tmp_path / "model"))


def test_shards(tmp_path):
    back = round_trip(GOLDEN / "image_c1/hf", tmp_path, max_shard_bytes=200_000)
    given = load(GOLDEN / "image_c1/hf")
    assert same(load(back), given)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in given.values())
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 210_000 for path in files)
    for path in files:
        with safe_open(path, "numpy") as file:
            assert {name for name, f in index["weight_map"].items() if f == path.name} == set(file.keys())


def test_a_tied_head_is_not_written(tmp_path):
    tensors = {n: t for n, t in load(GOLDEN / "image_c1/hf").items() if n != HEAD}
    back = round_trip(checkpoint(tmp_path, tensors, tie_word_embeddings=True), tmp_path)
    assert same(load(back), tensors)
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_encoder_with_a_hub_name_needs_no_folder(tmp_path, monkeypatch):
    from lmm_jax.config import VisionConfig

    monkeypatch.setattr("conversion.vision.BUILT_IN", VisionConfig(64, 128, 3, 4, image_size=56))
    name = "openai/clip-vit-large-patch14-336"
    tensors = load(GOLDEN / "image_c1/hf")
    back = round_trip(checkpoint(tmp_path, tensors, mm_vision_tower=name), tmp_path)
    assert {p.name for p in back.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((back / "config.json").read_text())["mm_vision_tower"] == name
    assert same(load(back), tensors)


def test_tokenizer_files_travel_back(tmp_path):
    hf = checkpoint(tmp_path, load(GOLDEN / "image_c1/hf"))
    for path in (GOLDEN / "text/vicuna_tokenizer").iterdir():
        shutil.copy(path, hf)
    (hf / "generation_config.json").write_text('{"eos_token_id": 2}')
    back = round_trip(hf, tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (back / name).read_bytes() == (hf / name).read_bytes()


def test_transformers_reads_the_parts(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig

    back = round_trip(GOLDEN / "image_c1/hf", tmp_path)
    vision = CLIPVisionConfig.from_pretrained(back / "vision_tower")
    assert (vision.hidden_size, vision.image_size, vision.hidden_act) == (64, 56, "quick_gelu")
    data = json.loads((back / "config.json").read_text())
    llama = LlamaConfig.from_dict({**data, "model_type": "llama"})
    assert (llama.num_key_value_heads, llama.rope_parameters["rope_type"]) == (2, "llama3")


def test_dst_must_be_empty(tmp_path):
    from_hf(str(GOLDEN / "image_c1/hf"), str(tmp_path / "model"), QUIET)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "model"):
        with pytest.raises(UserError, match="choose another name"):
            to_hf(str(tmp_path / "model"), str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    to_hf(str(tmp_path / "model"), str(tmp_path / "empty"), report=lambda line: None)
    assert (tmp_path / "empty/model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full", "model"]


def test_sources_that_are_no_model_folder(tmp_path):
    with pytest.raises(UserError, match="from-hf"):
        to_hf(str(GOLDEN / "image_c1/hf"), str(tmp_path / "back"))
    with pytest.raises(UserError):
        to_hf(str(tmp_path / "nothing"), str(tmp_path / "back"))


def test_leaves_that_do_not_fit_are_all_listed(tmp_path):
    from_hf(str(GOLDEN / "image_c1/hf"), str(tmp_path / "model"), QUIET)
    held = leaves(tmp_path / "model")
    held["extra.kernel"] = held.pop("norm.scale")
    held["embed_tokens.embedding"] = held["embed_tokens.embedding"][:-1]
    held["compressor.attn.q_proj.bias"] = held["compressor.attn.q_proj.bias"].astype(np.float16)
    write_model(tmp_path / "broken", read_config(tmp_path / "model"), held)
    assert "extra.kernel" in leaf_shapes(tmp_path / "broken")
    with pytest.raises(UserError) as error:
        to_hf(str(tmp_path / "broken"), str(tmp_path / "back"))
    for part in (
        "missing (1): norm.scale",
        "unknown (1): extra.kernel",
        "wrong shape (1): embed_tokens.embedding",
        "several dtypes (1): model.compressor.attn.in_proj_bias",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("error, raised", [(KeyboardInterrupt, KeyboardInterrupt), (OSError("disk full"), UserError)])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, error, raised):
    from_hf(str(GOLDEN / "image_c1/hf"), str(tmp_path / "model"), QUIET)
    reads = []

    def read_leaf(folder, name):
        reads.append(name)
        if len(reads) > 50:
            raise error
        return leaves_of_model[name]

    leaves_of_model = leaves(tmp_path / "model")
    monkeypatch.setattr("conversion.to_hf.read_leaf", read_leaf)
    with pytest.raises(raised):
        to_hf(str(tmp_path / "model"), str(tmp_path / "back"), report=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

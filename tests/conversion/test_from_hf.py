import dataclasses
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from crafting import CASES, GOLDEN, checkpoint, leaves, load, same, write_bin, write_config
from safetensors.numpy import save_file

from conversion.from_hf import Options, compose, from_hf
from conversion.names import EMBEDDING, HEAD, VISION_PREFIX
from lmm_jax.checkpoint import read_config
from lmm_jax.config import VisionConfig
from lmm_jax.errors import UserError

QUIET = Options(report=lambda line: None)
POSITIONS = np.arange(17, dtype=np.int64)[None]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tensors():
    return load(GOLDEN / "image_c1/hf")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    from_hf(str(GOLDEN / "image_c1/hf"), str(folder), QUIET)
    return leaves(folder)


def error_of(hf, **arguments):
    """The message of a conversion that must fail, and leave nothing."""
    dst = hf.parent / "model"
    with pytest.raises(UserError) as error:
        from_hf(str(hf), str(dst), **{"options": QUIET} | arguments)
    assert sorted(p.name for p in hf.parent.iterdir()) == ["clip", "hf"]
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", ["bin", "bin shards", "safetensors shards", "no index"])
def test_every_layout_gives_the_same_leaves(tmp_path, tensors, converted, layout):
    hf = checkpoint(tmp_path, {})
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    if layout == "bin":
        write_bin(hf / "pytorch_model.bin", tensors)
    else:
        stem, kind = ("pytorch_model", "bin") if layout == "bin shards" else ("model", "safetensors")
        names = [f"{stem}-0000{i + 1}-of-00002.{kind}" for i in range(2)]
        for name, half in zip(names, halves):
            write_bin(hf / name, half) if kind == "bin" else save_file(half, hf / name)
        if layout != "no index":
            weight_map = {key: name for name, half in zip(names, halves) for key in half}
            (hf / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    from_hf(str(hf), str(tmp_path / "model"), QUIET)
    assert same(leaves(tmp_path / "model"), converted)


def test_each_tensor_keeps_its_dtype(tmp_path, tensors):
    dtypes = [np.float16, ml_dtypes.bfloat16, np.float32]
    mixed = {name: t.astype(dtypes[i % 3]) for i, (name, t) in enumerate(tensors.items())}
    from_hf(str(checkpoint(tmp_path, mixed)), str(tmp_path / "model"), QUIET)
    got = leaves(tmp_path / "model")
    assert got["layers.1.mlp.up_proj.kernel"].dtype == mixed[UP].dtype
    assert got["layers.1.mlp.up_proj.kernel"].tobytes() == mixed[UP].T.tobytes()
    assert {leaf.dtype for leaf in got.values()} == {np.dtype(d) for d in dtypes}


def test_all_tensors_in_a_chosen_dtype(tmp_path, tensors, converted):
    from_hf(str(checkpoint(tmp_path, tensors)), str(tmp_path / "model"), dataclasses.replace(QUIET, dtype="bfloat16"))
    expected = {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in converted.items()}
    assert same(leaves(tmp_path / "model"), expected)


@pytest.mark.parametrize("prefix, whole_clip", [("vision_model.", False), ("", False), ("vision_model.", True)])
def test_the_encoder_in_its_own_folder(tmp_path, tensors, converted, prefix, whole_clip):
    positions = (
        VISION_PREFIX + "embeddings.position_ids"
    )  # LLaVA-v1.5 carries this one tensor of the encoder, which has it too
    without = {n: t for n, t in tensors.items() if not n.startswith(VISION_PREFIX)}
    hf = checkpoint(tmp_path, without | {positions: POSITIONS})
    clip = {n.replace(VISION_PREFIX, prefix): t for n, t in tensors.items() if n.startswith(VISION_PREFIX)}
    clip[positions.replace(VISION_PREFIX, prefix)] = POSITIONS
    if whole_clip:
        clip |= {"text_model.final_layer_norm.bias": np.zeros(4, np.float32), "logit_scale": np.ones((), np.float32)}
        config = json.loads((tmp_path / "clip/config.json").read_text())
        (tmp_path / "clip/config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config}))
    save_file(clip, tmp_path / "clip/model.safetensors")
    from_hf(str(hf), str(tmp_path / "model"), QUIET)
    assert same(leaves(tmp_path / "model"), converted)
    shutil.move(tmp_path / "clip", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--vision DIR"):
        from_hf(str(hf), str(tmp_path / "again"), QUIET)
    from_hf(str(hf), str(tmp_path / "again"), QUIET, vision=str(tmp_path / "elsewhere"))
    assert same(leaves(tmp_path / "again"), converted)


def test_weights_inside_win_over_a_folder(tmp_path, tensors, converted):
    hf = checkpoint(tmp_path, tensors)
    clip = load(tmp_path / "clip")
    save_file({n: t + 1 for n, t in clip.items()}, tmp_path / "clip/model.safetensors")
    lines = []
    from_hf(str(hf), str(tmp_path / "model"), Options(report=lines.append))
    assert same(leaves(tmp_path / "model"), converted)
    assert "vision encoder: weights inside the checkpoint" in lines


def test_the_published_encoder_is_built_in(tmp_path, tensors, monkeypatch):
    """No folder and no network: wrong sizes for these weights, so it must come as far as comparing shapes."""
    monkeypatch.setattr("conversion.vision.BUILT_IN", VisionConfig(64, 128, 3, 4, image_size=56))
    hf = checkpoint(tmp_path, tensors, mm_vision_tower="openai/clip-vit-large-patch14-336")
    shutil.rmtree(tmp_path / "clip")
    from_hf(str(hf), str(tmp_path / "model"), QUIET)
    assert read_config(tmp_path / "model").vision.name == "openai/clip-vit-large-patch14-336"


def test_a_preprocessor_that_differs(tmp_path, tensors):
    hf = checkpoint(tmp_path, tensors)
    path = tmp_path / "clip/preprocessor_config.json"
    path.write_text(path.read_text().replace('"resample": 3', '"resample": 2'))
    assert "resample is 2, expected 3" in error_of(hf)


# ---------------------------------------------------------------------------------------------------------- strictness


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        VISION_PREFIX + "embeddings.position_ids",
        "model.vision_tower.vision_tower.text_model.encoder.layers.0.mlp.fc1.bias",
        "visual_projection.weight",
        "model.vision_tower.vision_tower.text_projection.weight",
        "logit_scale",
    ],
)
@pytest.mark.parametrize("write", [save_file, lambda tensors, path: write_bin(path.with_name("pytorch_model.bin"), tensors)])
def test_known_buffers_are_ignored_and_printed(tmp_path, tensors, converted, name, write):
    hf = checkpoint(tmp_path, {})
    write(tensors | {name: POSITIONS}, hf / "model.safetensors")
    lines = []
    from_hf(str(hf), str(tmp_path / "model"), Options(report=lines.append))
    assert same(leaves(tmp_path / "model"), converted)
    assert any(line.startswith("ignored 1 tensors") and name in line for line in lines)


def test_ignore_adds_a_pattern(tmp_path, tensors, converted):
    hf = checkpoint(tmp_path, tensors | {"model.temporal_router.0.weight": POSITIONS})
    assert "unknown (1): model.temporal_router.0.weight" in error_of(hf)
    assert "not a regular expression" in error_of(hf, options=Options(ignore=["("]))
    assert f"missing (1): {UP}" in error_of(hf, options=Options(ignore=["temporal_router", re.escape(UP)]))
    from_hf(str(hf), str(tmp_path / "model"), Options(ignore=["nothing", r"temporal_router\."], report=lambda line: None))
    assert same(leaves(tmp_path / "model"), converted)


def test_everything_that_is_wrong_is_in_one_error(tmp_path, tensors):
    hf = checkpoint(tmp_path, {})
    broken = {name: t for name, t in tensors.items() if "layers.2." not in name}
    broken |= {f"extra.{i:02}": POSITIONS for i in range(20)}
    broken["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    broken[UP] = tensors[UP].T.copy()
    save_file(broken, hf / "a.safetensors")
    save_file({EMBEDDING: tensors[EMBEDDING]}, hf / "b.safetensors")
    message = error_of(hf)
    assert f"duplicate (1): {EMBEDDING} (again in b.safetensors)" in message
    assert "missing (25): model.layers.2.input_layernorm.weight" in message and " and 17 more" in message
    assert "unknown (20): extra.00, extra.01" in message and " and 12 more" in message
    assert f"wrong shape (1): {UP} (64, 128), expected (128, 64)" in message
    assert "wrong dtype (1): model.norm.weight float64, expected fp16, bf16 or fp32" in message
    assert "\n" not in message


def test_a_tied_head_must_equal_the_embedding(tmp_path, tensors):
    hf = checkpoint(tmp_path, tensors, tie_word_embeddings=True)
    assert f"differs from the embedding although tie_word_embeddings is true (1): {HEAD}" in error_of(hf)
    for name, kept in (
        ("equal", tensors | {HEAD: tensors[EMBEDDING]}),
        ("absent", {n: t for n, t in tensors.items() if n != HEAD}),
    ):
        hf = checkpoint(tmp_path / name, kept, tie_word_embeddings=True)
        from_hf(str(hf), str(tmp_path / name / "model"), QUIET)
        assert "lm_head.kernel" not in leaves(tmp_path / name / "model")
    hf = checkpoint(tmp_path / "untied", {n: t for n, t in tensors.items() if n != HEAD})
    assert f"missing (1): {HEAD}" in error_of(hf)


@pytest.mark.parametrize("change", ["truncated", "config", "shard"])
def test_broken_checkpoints(tmp_path, tensors, change):
    hf = checkpoint(tmp_path, tensors)
    path = hf / "model.safetensors"
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        assert "truncated or damaged" in error_of(hf)
    elif change == "config":
        (hf / "config.json").write_text("{")
        assert "cannot be read as JSON" in error_of(hf)
    else:
        path.rename(hf / "model-00001-of-00002.safetensors")
        files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert "model-00002-of-00002.safetensors" in error_of(hf)


# ------------------------------------------------------------------------------------------------- tokenizer, DST, hub


def test_tokenizer_files_travel(tmp_path, tensors):
    hf = checkpoint(tmp_path, tensors)
    for path in (GOLDEN / "text/llama3_tokenizer").iterdir():
        shutil.copy(path, hf)
    (hf / "generation_config.json").write_text('{"eos_token_id": [487, 481]}')
    from_hf(str(hf), str(tmp_path / "model"), QUIET)
    files = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    assert {p.name for p in (tmp_path / "model").iterdir()} == files | {"config.json", "params"}
    config = read_config(tmp_path / "model")
    assert (config.template, config.eos_token_ids) == ("llava_llama_3_1", (487, 481))
    vicuna = Options(tokenizer=str(GOLDEN / "text/vicuna_tokenizer"), report=lambda line: None)
    from_hf(str(hf), str(tmp_path / "vicuna"), vicuna)
    names = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    assert {p.name for p in (tmp_path / "vicuna").iterdir()} == names | {"config.json", "params"}
    assert read_config(tmp_path / "vicuna").template == "v1"
    from_hf(str(hf), str(tmp_path / "chosen"), Options(template="llava_v1", report=lambda line: None))
    assert read_config(tmp_path / "chosen").template == "llava_v1"


def test_without_a_tokenizer_it_converts_and_says_what_is_missing(tmp_path, tensors):
    hf = checkpoint(tmp_path, tensors)
    assert "--tokenizer" in error_of(hf, options=Options(tokenizer=str(tmp_path / "clip")))
    lines = []
    from_hf(str(hf), str(tmp_path / "model"), Options(report=lines.append))
    assert any("lmm ask" in line and "--tokenizer DIR" in line for line in lines)


def test_dst_is_not_overwritten_unless_asked(tmp_path, tensors, converted):
    hf = checkpoint(tmp_path, tensors)
    dst = tmp_path / "model"
    from_hf(str(hf), str(dst), QUIET)
    write_config(hf, max_position_embeddings=99)
    with pytest.raises(UserError, match="exists already"):
        from_hf(str(hf), str(dst), QUIET)
    assert read_config(dst).decoder.max_position_embeddings == 512
    from_hf(str(hf), str(dst), Options(overwrite=True, report=lambda line: None))
    assert read_config(dst).decoder.max_position_embeddings == 99
    with pytest.raises(UserError, match="already"):
        from_hf(str(dst), str(tmp_path / "other"), QUIET)


def test_sources_that_are_no_checkpoint(tmp_path):
    dst = str(tmp_path / "model")
    (tmp_path / "file").write_text("")
    for src, message in (
        ("no/such/folder", "no folder"),
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path), "no weights"),
    ):
        with pytest.raises(UserError, match=message):
            from_hf(src, dst, QUIET)


def test_hub_names(tmp_path, tensors, converted, monkeypatch):
    hf = checkpoint(tmp_path, {})
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if "pytorch_model*.bin" in allow_patterns:
            write_bin(hf / "pytorch_model.bin", tensors)
        return str(hf)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    from_hf("owner/name", str(tmp_path / "model"), QUIET)
    assert same(leaves(tmp_path / "model"), converted)
    assert [name for name, _ in asked] == ["owner/name"] * 2

    def no_network(name, allow_patterns):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(UserError, match=r"no folder owner/name.*no network;"):
        from_hf("owner/name", str(tmp_path / "other"), QUIET)


# ---------------------------------------------------------------------------------------------------- start of stage 1


def text_only(tmp_path, **config):
    whole = load(GOLDEN / "llava_v1_5/hf")
    llm = {n: t.astype(np.float16) for n, t in whole.items() if "mm_projector" not in n and "vision_tower" not in n}
    llm["model.layers.0.self_attn.rotary_emb.inv_freq"] = POSITIONS
    return checkpoint(tmp_path, llm, "llava_v1_5", model_type="llama", **config), whole


def test_composing_the_start_of_stage_1(tmp_path):
    llm, whole = text_only(tmp_path)
    dst = tmp_path / "model"
    compose(str(llm), str(tmp_path / "clip"), str(dst), QUIET, seed=3)
    config, got = read_config(dst), leaves(dst)
    assert (config.compressor, config.prefusion_layers, config.template) == (None, 0, "v1")
    from_hf(str(GOLDEN / "llava_v1_5/hf"), str(tmp_path / "whole"), QUIET)
    expected = leaves(tmp_path / "whole")
    assert got.keys() == expected.keys()
    for name, leaf in got.items():
        if "mm_projector" not in name:
            dtype = np.float32 if "vision_tower" in name else np.float16
            assert leaf.tobytes() == expected[name].astype(dtype).tobytes(), name
    kernel, bias = got["mm_projector.linear_1.kernel"], got["mm_projector.linear_1.bias"]
    assert (kernel.dtype, kernel.shape, not bias.any()) == (np.float16, (64, 64), True)
    assert kernel.astype(np.float64).std() == pytest.approx(1 / np.sqrt(3 * 64), rel=0.05)
    compose(str(llm), str(tmp_path / "clip"), str(tmp_path / "same"), QUIET, seed=3)
    compose(str(llm), str(tmp_path / "clip"), str(tmp_path / "other"), QUIET, seed=4)
    assert same(leaves(tmp_path / "same"), got)
    assert not np.array_equal(leaves(tmp_path / "other")["mm_projector.linear_1.kernel"], kernel)


def test_composing_lists_what_does_not_fit(tmp_path):
    llm, _ = text_only(tmp_path, vocab_size=600)
    clip = load(tmp_path / "clip")
    clip.pop("vision_model.pre_layrnorm.bias")
    save_file(clip, tmp_path / "clip/model.safetensors")
    with pytest.raises(UserError) as error:
        compose(str(llm), str(tmp_path / "clip"), str(tmp_path / "model"), QUIET)
    assert f"missing (1): {VISION_PREFIX}pre_layrnorm.bias" in str(error.value)
    assert f"wrong shape (2): {HEAD} (512, 64), expected (600, 64)" in str(error.value)
    with pytest.raises(UserError, match="not a text-only LLaMA"):
        compose(str(GOLDEN / "llava_v1_5/hf"), str(tmp_path / "clip"), str(tmp_path / "model"), QUIET)


def test_values_land_where_the_model_reads_them(tensors, converted):
    """Written out once by hand: 64 channels, 4 heads (2 for keys) of 16; 8 heads of 8 in the compressor."""

    def layer(name):
        return tensors[f"model.layers.2.self_attn.{name}_proj.weight"], converted[f"layers.2.self_attn.{name}_proj.kernel"]

    (q, q_kernel), (k, k_kernel), (o, o_kernel) = layer("q"), layer("k"), layer("o")
    assert (q_kernel.shape, k_kernel.shape, o_kernel.shape) == ((64, 4, 16), (64, 2, 16), (4, 16, 64))
    assert np.array_equal(q_kernel[:, 3, 5], q[3 * 16 + 5])
    assert np.array_equal(k_kernel[:, 1, 2], k[1 * 16 + 2])
    assert np.array_equal(o_kernel[3, 5], o[:, 3 * 16 + 5])
    packed, bias = tensors["model.compressor.attn.in_proj_weight"], tensors["model.compressor.attn.in_proj_bias"]
    for i, name in enumerate("qkv"):
        assert np.array_equal(converted[f"compressor.attn.{name}_proj.kernel"][:, 7, 6], packed[64 * i + 7 * 8 + 6])
        assert np.array_equal(converted[f"compressor.attn.{name}_proj.bias"].reshape(-1), bias[64 * i : 64 * (i + 1)])
    conv = tensors[VISION_PREFIX + "embeddings.patch_embedding.weight"]
    patches = converted["vision_tower.embeddings.patch_embedding.kernel"]
    assert np.array_equal(patches[(13 * 14 + 2) * 3 + 1], conv[:, 1, 13, 2])
    assert np.array_equal(converted["mm_projector.linear_2.kernel"], tensors["model.mm_projector.2.weight"].T)
    assert np.array_equal(
        converted["vision_tower.layers.1.mlp.fc1.bias"], tensors[VISION_PREFIX + "encoder.layers.1.mlp.fc1.bias"]
    )
    assert np.array_equal(converted["norm.scale"], tensors["model.norm.weight"])
    assert np.array_equal(converted["embed_tokens.embedding"], tensors[EMBEDDING])


@pytest.mark.parametrize("case", CASES)
def test_golden_checkpoints_convert(tmp_path, case):
    from_hf(str(GOLDEN / case / "hf"), str(tmp_path / "model"), QUIET)
    tensors, got = load(GOLDEN / case / "hf"), leaves(tmp_path / "model")
    assert sum(t.size for t in tensors.values()) == sum(leaf.size for leaf in got.values())
    np.testing.assert_array_equal(got["lm_head.kernel"], tensors[HEAD].T)

import dataclasses
import json

import pytest
from crafting import GOLDEN

from conversion.hf_config import (
    check_preprocessor,
    model_from_hf,
    model_to_hf,
    preprocessor_to_hf,
    text_model_from_hf,
    vision_from_hf,
    vision_to_hf,
)
from conversion.tokenizers import Tokenizer, read_tokenizer
from lmm_jax.config import DecoderConfig, ModelConfig, RopeScaling, VisionConfig, named_sizes
from lmm_jax.errors import UserError

VISION = VisionConfig(64, 128, 3, 4, image_size=56, name="")


def golden(case="image_c1", **changes):
    data = json.loads((GOLDEN / case / "hf/config.json").read_text()) | changes
    return {key: value for key, value in data.items() if value is not ...}


def convert(hf, generation=None, tokenizer=None, vision=VISION):
    return model_from_hf(hf, generation or {}, vision, tokenizer or Tokenizer(), "config.json")


def test_golden_configurations():
    config = convert(golden())
    assert config.decoder == DecoderConfig(512, 64, 128, 3, 4, 2, 16, 1e-5, 500000.0, RopeScaling(8, 1, 4, 64), 512, False)
    assert (config.compressor.size, config.prefusion_layers, config.resolution_ratio) == (1, 2, 1)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id, config.template) == (1, (2,), 0, "v1")
    hd = convert(golden("hd_c2"))
    assert (hd.compressor.size, hd.prefusion_layers, hd.resolution_ratio, hd.decoder.rope_scaling) == (2, 3, 2, None)
    v1_5 = convert(golden("llava_v1_5"))
    assert (v1_5.compressor, v1_5.prefusion_layers, v1_5.image_aspect_ratio) == (None, 0, "pad")


@pytest.mark.parametrize("size", named_sizes())
def test_to_hf_and_back(size):
    config = dataclasses.replace(named_sizes()[size], template="v1")
    hf = json.loads(json.dumps(model_to_hf(config, "bfloat16", "x")))
    assert convert(hf, tokenizer=Tokenizer(folder=GOLDEN), vision=config.vision) == config
    vision = json.loads(json.dumps(vision_to_hf(config.vision, "bfloat16")))
    assert vision_from_hf(vision, config.vision.name, "clip") == config.vision
    check_preprocessor(preprocessor_to_hf(config.vision), config.vision, "clip")


def test_the_export_has_the_keys_of_the_published_checkpoint():
    ours = model_to_hf(convert(golden("hd_c2")), "float32", "../clip")
    theirs = golden("hd_c2")
    training = {"freeze_mm_mlp_adapter", "mm_projector_lr", "tune_mm_mlp_adapter"}
    assert {key: theirs[key] for key in theirs.keys() - training} == ours


def test_defaults_of_absent_keys():
    absent = ("prefusion_layer_num", "resolution_ratio", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")
    more = ("image_aspect_ratio", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "mm_hidden_size")
    config = convert(golden(**{key: ... for key in absent + more}))
    assert (config.prefusion_layers, config.resolution_ratio, config.image_aspect_ratio) == (4, 1, "square")
    assert (config.decoder.num_kv_heads, config.decoder.rms_norm_eps, config.decoder.rope_theta) == (4, 1e-6, 10000.0)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 0)
    assert convert(golden(compressor_size=..., prefusion_layer_num=4)).prefusion_layers == 0
    assert convert(golden(head_dim=32)).decoder.head_dim == 32


def test_model_types():
    assert convert(golden("llava_v1_5", model_type="llava")).compressor is None
    for changes in ({"model_type": "qwen2"}, {"model_type": "llava", "text_config": {}}, {"model_type": ...}):
        with pytest.raises(UserError, match="model_type"):
            convert(golden(**changes))
    text = golden(model_type="llama")
    config = text_model_from_hf(text, {}, VISION, Tokenizer(), "config.json")
    assert (config.compressor, config.prefusion_layers, config.decoder.num_kv_heads) == (None, 0, 2)
    with pytest.raises(UserError, match="not a text-only LLaMA"):
        text_model_from_hf(golden(), {}, VISION, Tokenizer(), "config.json")


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("quantization_config", {"bits": 4}),
        ("mm_projector_type", "linear"),
        ("mm_projector_type", ...),
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_layer", None),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_hidden_size", 1024),
        ("image_aspect_ratio", "anyres"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", [8.0]),
        ("hidden_size", ...),
        ("hidden_size", "64"),
        ("num_key_value_heads", 0),
        ("num_hidden_layers", -3),
        ("num_attention_heads", 5),
        ("vocab_size", True),
        ("prefusion_layer_num", -1),
        ("compressor_size", 0),
        ("eos_token_id", ["</s>"]),
        ("eos_token_id", []),
    ],
)
def test_what_cannot_be_represented_is_named(key, value):
    with pytest.raises(UserError) as error:
        convert(golden(**{key: value}))
    message = str(error.value)
    simple = value if isinstance(value, str | int) and not isinstance(value, bool) else None
    assert key in message or key == "rope_scaling", message
    assert simple is None or str(simple) in message, message


def test_rope_of_three_generations():
    scaling = golden()["rope_scaling"]
    legacy = {key: value for key, value in scaling.items() if key != "rope_type"} | {"type": "llama3"}
    expected = convert(golden()).decoder
    assert convert(golden(rope_scaling=legacy)).decoder == expected
    modern = {"rope_parameters": scaling | {"rope_theta": 500000.0}, "rope_theta": ..., "rope_scaling": ...}
    assert convert(golden(**modern)).decoder == expected
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": ..., "rope_scaling": ...}
    assert (convert(golden(**plain)).decoder.rope_theta, convert(golden(**plain)).decoder.rope_scaling) == (10000.0, None)


def test_stop_tokens():
    assert convert(golden(), {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert convert(golden(), {"eos_token_id": 5}).eos_token_ids == (5,)
    assert convert(golden(eos_token_id=[3, 4])).eos_token_ids == (3, 4)


def test_template_and_padding_come_from_the_tokenizer(tmp_path):
    llama = read_tokenizer([tmp_path, GOLDEN / "text/llama3_tokenizer"])
    vicuna = read_tokenizer([GOLDEN / "text/vicuna_tokenizer"])
    assert (llama.folder, llama.is_llama_3, vicuna.is_llama_3) == (GOLDEN / "text/llama3_tokenizer", True, False)
    assert convert(golden(pad_token_id=...), tokenizer=llama).template == "llava_llama_3_1"
    assert convert(golden(pad_token_id=None), tokenizer=llama).pad_token_id == 485
    assert convert(golden(pad_token_id=-1), tokenizer=vicuna).pad_token_id == 0
    assert convert(golden(pad_token_id=7), tokenizer=llama).pad_token_id == 7
    assert convert(golden(), tokenizer=dataclasses.replace(llama, chat_template=False)).template == "v1"
    assert convert(golden(bos_token_id=128000)).template == "llava_llama_3_1"
    assert read_tokenizer([tmp_path]) == Tokenizer()


def test_a_chat_template_in_its_own_file(tmp_path):
    source = GOLDEN / "text/llama3_tokenizer"
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["chat_template"], config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    assert not read_tokenizer([tmp_path]).is_llama_3
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_tokenizer([tmp_path]).is_llama_3
    assert read_tokenizer([tmp_path]).padding_id == 485
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"text": 1}]}')
    with pytest.raises(UserError, match="added tokens"):
        read_tokenizer([tmp_path])


def test_clip_configurations():
    own = json.loads((GOLDEN / "image_c1/clip/config.json").read_text())
    assert vision_from_hf(own, "", "clip") == VISION
    assert vision_from_hf({"model_type": "clip", "vision_config": own, "text_config": {}}, "", "clip") == VISION
    large = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16}
    large |= {"num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    built_in = VisionConfig()
    assert vision_from_hf({"model_type": "clip", "vision_config": large}, built_in.name, "clip") == built_in
    for changes in ({"hidden_act": "gelu"}, {"model_type": "siglip"}, {"num_channels": 1}, {"hidden_size": "64"}):
        with pytest.raises(UserError, match=next(iter(changes))):
            vision_from_hf(own | changes, "", "clip")


def test_preprocessors():
    own = json.loads((GOLDEN / "image_c1/clip/preprocessor_config.json").read_text())
    check_preprocessor(own, VISION, "clip")
    old = {"crop_size": 56, "size": 56, "do_resize": True, "image_mean": own["image_mean"], "image_std": own["image_std"]}
    check_preprocessor(old, VISION, "clip")
    for changes in (
        {"size": {"shortest_edge": 224}},
        {"crop_size": 224},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [1.0]},
        {"resample": 2},
        {"rescale_factor": 1.0},
        {"do_center_crop": False},
    ):
        with pytest.raises(UserError, match=next(iter(changes))):
            check_preprocessor(own | changes, VISION, "clip")


def test_an_impossible_model_is_refused():
    with pytest.raises(UserError, match="num_heads"):
        ModelConfig(decoder=dataclasses.replace(DecoderConfig(), num_kv_heads=5))

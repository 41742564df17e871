"""Hugging Face ``config.json`` <-> `ModelConfig` (spec section 9). What cannot be represented is refused by key and value."""

from __future__ import annotations

import dataclasses
from typing import Any

from conversion.tokenizers import Tokenizer
from lmm_jax.config import CompressorConfig, DecoderConfig, ModelConfig, RopeScaling, VisionConfig
from lmm_jax.errors import UserError

Json = dict[str, Any]

LLAVA_TYPES = ("llava_mini_llama", "llava_llama", "llava")
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
_REQUIRED = object()

# Key -> the value that this model has; absent or null means the same.
_LLAMA_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "quantization_config": None,
}
_LLAVA_FIXED = {
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat",
    "mm_resampler_type": None,
    "s2": False,
}
# Key -> the value that this model has; absent means another one in the published code.
_LLAVA_REQUIRED = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
_CLIP_FIXED = {"hidden_act": "quick_gelu", "num_channels": 3}


def model_from_hf(hf: Json, generation: Json, vision: VisionConfig, tokenizer: Tokenizer, where: str) -> ModelConfig:
    """The configuration of a LLaVA-Mini or LLaVA-v1.5 checkpoint.

    Args:
      hf: its ``config.json``.
      generation: its ``generation_config.json``, empty when there is none.
      vision: the encoder's configuration, which is not in ``config.json``.
      tokenizer: decides the prompt template.
      where: names the checkpoint in errors.

    Raises:
      UserError: another architecture, or a setting that this model does not have: key and value are named.
    """
    kind = hf.get("model_type")
    if kind not in LLAVA_TYPES or "text_config" in hf:
        own = " in transformers' own layout (text_config, vision_config)" if "text_config" in hf else ""
        raise UserError(f"{where}: model_type {kind!r}{own} is not supported, expected one of {', '.join(LLAVA_TYPES)}")
    absent = {key: "absent" for key in _LLAVA_REQUIRED if hf.get(key) is None}
    _check_fixed({**hf, **absent}, _LLAVA_FIXED | _LLAVA_REQUIRED, where)
    width = _size(hf, "mm_hidden_size", where, vision.hidden_size)
    if width != vision.hidden_size:
        raise UserError(f"{where}: mm_hidden_size is {width}, but the vision encoder has hidden_size {vision.hidden_size}")
    compressed = hf.get("compressor_size") is not None
    return ModelConfig(
        vision=vision,
        decoder=decoder_from_hf(hf, where),
        compressor=CompressorConfig(_size(hf, "compressor_size", where)) if compressed else None,
        prefusion_layers=_size(hf, "prefusion_layer_num", where, 4, least=0) if compressed else 0,
        resolution_ratio=_size(hf, "resolution_ratio", where, 1),
        image_aspect_ratio=_get(hf, "image_aspect_ratio", str, where, "square"),
        **_language(hf, generation, tokenizer, where),
    )


def text_model_from_hf(hf: Json, generation: Json, vision: VisionConfig, tokenizer: Tokenizer, where: str) -> ModelConfig:
    """The model at the start of stage 1: a text-only LLaMA and an encoder, no compressor and no pre-fusion layers.

    Arguments and errors as in `model_from_hf`.
    """
    if hf.get("model_type") != "llama":
        raise UserError(f"{where}: model_type {hf.get('model_type')!r} is not a text-only LLaMA, expected 'llama'")
    language = _language(hf, generation, tokenizer, where)
    return ModelConfig(vision, decoder_from_hf(hf, where), compressor=None, prefusion_layers=0, **language)


def decoder_from_hf(hf: Json, where: str) -> DecoderConfig:
    """The LLaMA keys; absent ones have the defaults of transformers' LlamaConfig.

    Raises:
      UserError: a key is missing, of the wrong type, or set to what this decoder does not do.
    """
    _check_fixed(hf, _LLAMA_FIXED, where)
    hidden, heads = _size(hf, "hidden_size", where), _size(hf, "num_attention_heads", where)
    theta, scaling = _rope(hf, where)
    if hf.get("head_dim") is None and hidden % heads:
        raise UserError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return DecoderConfig(
        vocab_size=_size(hf, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_size(hf, "intermediate_size", where),
        num_layers=_size(hf, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=_size(hf, "num_key_value_heads", where, heads),
        head_dim=_size(hf, "head_dim", where, hidden // heads),
        rms_norm_eps=_get(hf, "rms_norm_eps", float, where, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_size(hf, "max_position_embeddings", where, 2048),
        tie_word_embeddings=_get(hf, "tie_word_embeddings", bool, where, False),
    )


def vision_from_hf(hf: Json, name: str, where: str) -> VisionConfig:
    """A CLIPVisionModel's ``config.json``, or a whole CLIPModel's; absent keys have CLIPVisionConfig's defaults.

    Args:
      hf: the configuration.
      name: the encoder's name on the hub, "" when it has none.
      where: names the folder in errors.

    Raises:
      UserError: not CLIP, a key of the wrong type, or another activation than quick_gelu.
    """
    if hf.get("model_type") not in ("clip_vision_model", "clip"):
        raise UserError(f"{where}: model_type {hf.get('model_type')!r} is not CLIP, the only vision encoder supported")
    hf = _get(hf, "vision_config", dict, where, hf)
    _check_fixed(hf, _CLIP_FIXED, where)
    return VisionConfig(
        hidden_size=_size(hf, "hidden_size", where, 768),
        intermediate_size=_size(hf, "intermediate_size", where, 3072),
        num_layers=_size(hf, "num_hidden_layers", where, 12),
        num_heads=_size(hf, "num_attention_heads", where, 12),
        patch_size=_size(hf, "patch_size", where, 32),
        image_size=_size(hf, "image_size", where, 224),
        layer_norm_eps=_get(hf, "layer_norm_eps", float, where, 1e-5),
        name=name,
    )


def check_preprocessor(hf: Json, vision: VisionConfig, where: str) -> None:
    """Refuses a ``preprocessor_config.json`` that says anything but spec section 7, which is what this project does.

    Raises:
      UserError: naming every key and value that differs.
    """
    side = vision.image_size
    expected = preprocessor_to_hf(vision)
    del expected["image_processor_type"]
    accepted = {
        "size": (side, {"shortest_edge": side}),
        "crop_size": (side, {"height": side, "width": side}),
        "resample": (3,),
    }
    odd = []
    for key, value in expected.items():
        given = hf.get(key, value)
        if key in ("image_mean", "image_std", "rescale_factor"):
            fits = _close(given, value)
        else:
            fits = given in accepted.get(key, (value,))
        if not fits:
            odd.append(f"{key} is {given!r}, expected {value!r}")
    if odd:
        raise UserError(f"{where}: " + "; ".join(odd) + ": images are always prepared as CLIP's own encoder expects them")


def model_to_hf(config: ModelConfig, dtype: str, vision_tower: str) -> Json:
    """A ``config.json`` that the published PyTorch code loads.

    Args:
      config: the model.
      dtype: "float16", "bfloat16" or "float32".
      vision_tower: hub name, or folder relative to the checkpoint.
    """
    mini = config.compressor is not None
    eos = config.eos_token_ids
    hf: Json = {
        "architectures": ["LlavaMiniLlamaForCausalLM" if mini else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mini_llama" if mini else "llava_llama",
        **_decoder_to_hf(config.decoder),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": vision_tower,
        "tokenizer_model_max_length": config.decoder.max_position_embeddings,
        "tokenizer_padding_side": "right",
        "torch_dtype": dtype,
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_mm_proj": True,
    }
    if config.compressor:
        hf["compressor_size"] = config.compressor.size
        hf["prefusion_layer_num"] = config.prefusion_layers
        hf["resolution_ratio"] = config.resolution_ratio
    return hf


def vision_to_hf(vision: VisionConfig, dtype: str) -> Json:
    """The encoder's own ``config.json``."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "torch_dtype": dtype,
    }


def preprocessor_to_hf(vision: VisionConfig) -> Json:
    """The encoder's ``preprocessor_config.json`` (spec section 7)."""
    side = vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }


def _decoder_to_hf(d: DecoderConfig) -> Json:
    scaling = d.rope_scaling
    hf: Json = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": d.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": d.intermediate_size,
        "max_position_embeddings": d.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": d.num_heads,
        "num_hidden_layers": d.num_layers,
        "num_key_value_heads": d.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": d.rms_norm_eps,
        "rope_scaling": {"rope_type": "llama3", **dataclasses.asdict(scaling)} if scaling else None,
        "rope_theta": d.rope_theta,
        "tie_word_embeddings": d.tie_word_embeddings,
        "vocab_size": d.vocab_size,
    }
    if d.head_dim * d.num_heads != d.hidden_size:
        hf["head_dim"] = d.head_dim
    return hf


def _rope(hf: Json, where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = _get(hf, "rope_parameters", dict, where, _get(hf, "rope_scaling", dict, where, {}))
    theta = _get(rope, "rope_theta", float, where, _get(hf, "rope_theta", float, where, 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: rope_scaling of type {kind!r} is not supported, expected 'llama3' or none")
    return theta, RopeScaling(
        factor=_get(rope, "factor", float, where),
        low_freq_factor=_get(rope, "low_freq_factor", float, where),
        high_freq_factor=_get(rope, "high_freq_factor", float, where),
        original_max_position_embeddings=_get(rope, "original_max_position_embeddings", int, where),
    )


def _language(hf: Json, generation: Json, tokenizer: Tokenizer, where: str) -> Json:
    """Template and special ids: the fields of `ModelConfig` that depend on the tokenizer."""
    bos = _get(hf, "bos_token_id", int, where, 1)
    eos = generation.get("eos_token_id", hf.get("eos_token_id"))
    eos = [2] if eos is None else eos if isinstance(eos, list) else [eos]
    if not eos or not all(isinstance(i, int) for i in eos):
        raise UserError(f"{where}: eos_token_id is {eos!r}, expected an id or a list of ids")
    pad = _get(hf, "pad_token_id", int, where, -1)
    if pad < 0:  # old LLaMA checkpoints say -1 for "none"
        pad = tokenizer.padding_id or 0
    llama_3 = tokenizer.is_llama_3 or (tokenizer.folder is None and bos == 128000)
    return {
        "template": "llava_llama_3_1" if llama_3 else "v1",
        "bos_token_id": bos,
        "eos_token_ids": tuple(eos),
        "pad_token_id": pad,
    }


def _get(hf: Json, key: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    """The value at `key`, the default where it is absent or null; numbers may be whole where a float is wanted."""
    value = hf.get(key)
    if value is None:
        value = default
    if value is _REQUIRED:
        raise UserError(f"{where}: {key} is missing")
    fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise UserError(f"{where}: {key} is {value!r}, expected {kind.__name__}")
    return kind(value)


def _size(hf: Json, key: str, where: str, default: Any = _REQUIRED, least: int = 1) -> int:
    value = _get(hf, key, int, where, default)
    if value < least:
        raise UserError(f"{where}: {key} is {value}, expected at least {least}")
    return value


def _check_fixed(hf: Json, fixed: Json, where: str) -> None:
    odd = [f"{k} {hf[k]!r} (expected {v!r})" for k, v in fixed.items() if hf.get(k) is not None and hf[k] != v]
    if odd:
        raise UserError(f"{where}: not supported: {', '.join(odd)}")


def _close(given: Any, value: Any) -> bool:
    given, value = (x if isinstance(x, list) else [x] for x in (given, value))
    numbers = all(isinstance(x, int | float) for x in given)
    return numbers and len(given) == len(value) and all(abs(a - b) < 1e-7 for a, b in zip(given, value))

"""What a model is made of: frozen dataclasses, JSON in and out, and the named sizes.

A config is hashable, so it can be a static argument of a jitted function. Facts: MODEL_SPEC sections 1-5 and 9; the JSON
form is the ``config.json`` of a model folder.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lmm_jax.errors import UserError

FORMAT = "lmm-jax"
FORMAT_VERSION = 1
IMAGE_TOKEN_ID = -200  # stands for an image in a row of token ids, as in the published code
IGNORE_LABEL = -100

TEMPLATES = ("llava_llama_3_1", "llava_llama_3_1_two_bos", "v1", "llava_v1", "plain")
ASPECT_RATIOS = ("square", "pad")
REMAT = ("none", "full", "attention", "narrow", "dots")  # what a backward pass finds, see `layers.rematerialised`
QUANTIZATIONS = ("int8", "int4")  # of weights, at inference
KV_CACHES = ("bfloat16", "int8")  # what keys and values are kept in, if not as they are computed


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """CLIP vision transformer; the feature is the output of block ``num_layers - 1``, class token dropped.

    Defaults are those of ``openai/clip-vit-large-patch14-336``.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 336
    layer_norm_eps: float = 1e-5
    name: str = "openai/clip-vit-large-patch14-336"  # written to `mm_vision_tower` on export

    @property
    def grid(self) -> int:
        """Patches along one side (G)."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """LLaMA-3.1's stretching of low rotary frequencies (``rope_type: llama3``)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """LLaMA decoder; the pre-fusion layers share every one of these sizes except the number of layers."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """Query-based compression: ``size``² queries attend to the vision features."""

    size: int = 1
    num_heads: int = 8
    layer_norm_eps: float = 1e-5

    @property
    def num_queries(self) -> int:
        """Vision tokens per image (C²)."""
        return self.size**2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model. Without compressor and pre-fusion layers it is LLaVA-v1.5."""

    vision: VisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    compressor: CompressorConfig | None = CompressorConfig()
    prefusion_layers: int = 4
    resolution_ratio: int = 1  # n: an image is n×n tiles and the whole image when n > 1
    image_aspect_ratio: str = "square"
    template: str = "v1"  # the prompt template `ask` uses unless told otherwise
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tiles(self) -> int:
        """Pictures the encoder sees per image (P): 1, or n²+1 in high resolution."""
        n = self.resolution_ratio
        return 1 if n == 1 else n * n + 1

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens an image takes in the decoder's input (V): C², or G² without a compressor."""
        return self.compressor.num_queries if self.compressor else self.vision.grid**2

    @property
    def prefix_length(self) -> int:
        """Length of the image's part of the pre-fusion sequence: features of tiles and whole image, then C² tokens."""
        n, g = self.resolution_ratio, self.vision.grid
        hd = (n * g) ** 2 if n > 1 else 0
        return hd + g * g + self.tokens_per_image


def _check(c: ModelConfig) -> None:
    d, v = c.decoder, c.vision
    faults = []
    if d.num_heads % d.num_kv_heads:
        faults.append(f"num_heads {d.num_heads} is not a multiple of num_kv_heads {d.num_kv_heads}")
    if v.hidden_size % v.num_heads:
        faults.append(f"vision hidden_size {v.hidden_size} is not a multiple of its num_heads {v.num_heads}")
    if v.image_size % v.patch_size:
        faults.append(f"image_size {v.image_size} is not a multiple of patch_size {v.patch_size}")
    if v.num_layers < 2:
        faults.append("the vision encoder needs at least 2 layers, since its last one is not run")
    if c.compressor:
        if c.compressor.size < 1:
            faults.append(f"compressor size {c.compressor.size} is not positive")
        if v.hidden_size % c.compressor.num_heads or v.hidden_size % 4:
            faults.append(f"vision hidden_size {v.hidden_size} does not fit the compressor's {c.compressor.num_heads} heads")
    elif c.prefusion_layers or c.resolution_ratio != 1:
        faults.append("pre-fusion layers and high resolution need a compressor")
    if c.resolution_ratio < 1:
        faults.append(f"resolution_ratio {c.resolution_ratio} is not positive")
    if c.image_aspect_ratio not in ASPECT_RATIOS:
        faults.append(f"image_aspect_ratio {c.image_aspect_ratio!r} is not one of {', '.join(ASPECT_RATIOS)}")
    if c.template not in TEMPLATES:
        faults.append(f"template {c.template!r} is not one of {', '.join(TEMPLATES)}")
    if faults:
        raise UserError("this model configuration cannot work: " + "; ".join(faults))


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The content of a model folder's ``config.json``."""
    return {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(config)}


def from_json(data: dict[str, Any]) -> ModelConfig:
    """The inverse of `to_json`.

    Raises:
      UserError: not written by this project, a newer version, or unknown or missing fields.
    """
    data = dict(data)
    if data.pop("format", None) != FORMAT:
        raise UserError('config.json does not say "format": "lmm-jax"')
    version = data.pop("version", None)
    if version != FORMAT_VERSION:
        raise UserError(
            f"the model folder has format version {version}, this program reads version {FORMAT_VERSION}: update it"
        )
    return _build(ModelConfig, data, "config.json")


_NESTED = {"vision": VisionConfig, "decoder": DecoderConfig, "compressor": CompressorConfig, "rope_scaling": RopeScaling}


def _build(cls: type, data: Any, where: str) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(data, dict) or set(data) != names:
        got = set(data) if isinstance(data, dict) else set()
        raise UserError(f"{where}: unknown fields {sorted(got - names)}, missing fields {sorted(names - got)}")
    values = {}
    for name, value in data.items():
        if name in _NESTED and value is not None:
            value = _build(_NESTED[name], value, f"{where}: {name}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _llama_3_1_8b() -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_kv_heads=8,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(),
        max_position_embeddings=131072,
    )


def _tiny(**changes: Any) -> ModelConfig:
    """Small sizes for tests whose heads divide by 8, so that every mesh axis can split them."""
    vision = VisionConfig(64, 128, 3, 8, patch_size=14, image_size=56, name="")
    decoder = DecoderConfig(512, 128, 256, 4, 8, 8, 16, max_position_embeddings=2048)
    return dataclasses.replace(ModelConfig(vision, decoder, prefusion_layers=3), **changes)


def named_sizes() -> dict[str, ModelConfig]:
    """Name -> configuration of every size that is known by name (paper, table 9, and the published checkpoints)."""
    vicuna = ModelConfig()
    llama = ModelConfig(
        decoder=_llama_3_1_8b(),
        template="llava_llama_3_1",
        bos_token_id=128000,
        eos_token_ids=(128009, 128008, 128001),
        pad_token_id=128004,
    )
    return {
        "llava-mini-llama-3.1-8b": llama,
        "llava-mini-vicuna-7b": vicuna,
        "llava-mini-hd-vicuna-7b": dataclasses.replace(vicuna, compressor=CompressorConfig(size=8), resolution_ratio=2),
        "llava-v1.5-7b": dataclasses.replace(vicuna, compressor=None, prefusion_layers=0, image_aspect_ratio="pad"),
        "llava-v1.5-llama-3.1-8b": dataclasses.replace(llama, compressor=None, prefusion_layers=0, image_aspect_ratio="pad"),
        "tiny": _tiny(),
        "tiny-hd": _tiny(compressor=CompressorConfig(size=2), resolution_ratio=2),
        "tiny-llava-v1.5": _tiny(compressor=None, prefusion_layers=0),
    }

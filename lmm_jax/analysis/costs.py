"""What a question costs in FLOPs and memory, for a model and its variants, beside what was published (spec section 12)."""

from __future__ import annotations

import dataclasses

from lmm_jax.analysis import flops
from lmm_jax.config import CompressorConfig, ModelConfig, named_sizes

FRAMES = (1, 10, 60, 600, 3600, 10000)
SIDES = (1, 2, 4, 8)
V1_5 = "LLaVA-v1.5"

# TFLOPs of one picture with Vicuna-7B, from the paper's tables. They are of the published program, products with weights only.
PUBLISHED = {V1_5: (8.55,), "C=1": (1.96,), "C=2": (2.01,), "C=4": (2.19,), "C=8": (2.90,), "HD, C=1": (7.19, 8.13)}
NOTES = (
    "The published tables give 7.19 and 8.13 TFLOPs for high resolution. Both come out: the first with one vision token per "
    "image, the second with 64, which is what the released model has.",
    "They give 0.125 and about 1.0 TFLOPs for pre-fusion. Four layers over 620 positions are 1.00; 0.125 are 77 positions.",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a question about some images costs.

    Attributes:
      name: of the variant.
      ours: FLOPs by component, and "total", of our program.
      published: those of the published program.
      again: total of a further question about the same images.
      token: FLOPs of each token of the answer.
      cache_bytes: keys and values that the decoder keeps of the images.
      prefix_bytes: keys and values that pre-fusion keeps of the images, for further questions.
    """

    name: str
    ours: dict[str, float]
    published: dict[str, float]
    again: float
    token: float
    cache_bytes: int
    prefix_bytes: int


def label(config: ModelConfig) -> str:
    """What a variant is called."""
    if not config.compressor:
        return V1_5
    return f"{'HD, ' * (config.resolution_ratio > 1)}C={config.compressor.size}"


def variants(config: ModelConfig) -> list[ModelConfig]:
    """LLaVA-v1.5 and LLaVA-Mini with 1, 4, 16 and 64 vision tokens and in high resolution, all with the decoder of a model.

    Pre-fusion has as many layers as in the model; as many as published where that has none.
    """
    layers = config.prefusion_layers or ModelConfig().prefusion_layers
    mini = dataclasses.replace(config, compressor=CompressorConfig(), prefusion_layers=layers, resolution_ratio=1)
    sized = [
        dataclasses.replace(mini, compressor=CompressorConfig(side), resolution_ratio=ratio)
        for ratio in (1, 2)
        for side in SIDES
    ]
    return [dataclasses.replace(mini, compressor=None, prefusion_layers=0), *sized]


def cost(config: ModelConfig, images: int, text: int, *, attention: bool = False, bytes_each: int = 2) -> Cost:
    """What a question of `text` tokens about `images` pictures or frames costs; numbers take `bytes_each` bytes in memory."""
    d, length = config.decoder, images * config.tokens_per_image + text

    def count(**how: bool) -> dict[str, float]:
        return flops.totals(flops.question(config, images, text, **how), attention=attention)

    position = 2 * d.num_kv_heads * d.head_dim * bytes_each  # keys and values of one layer
    return Cost(
        label(config),
        count(),
        count(published=True),
        count(kept=True)["total"],
        flops.totals(flops.token(config, length + 1), attention=attention)["total"],
        images * config.tokens_per_image * d.num_layers * position,
        images * config.prefix_length * config.prefusion_layers * position,
    )


def is_published_case(config: ModelConfig, images: int, text: int, attention: bool) -> bool:
    """Whether `PUBLISHED` can stand beside the costs of a model's variants."""
    vicuna = named_sizes()["llava-mini-vicuna-7b"]
    alike = (config.vision, config.decoder) == (vicuna.vision, vicuna.decoder)
    return alike and (images, text, attention) == (1, flops.PUBLISHED_TEXT, False)

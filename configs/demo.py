"""What the runs of the demo model share: sizes, folders, groups. ``python examples/train_demo.py`` runs them all."""

from __future__ import annotations

from typing import Any

from lmm_jax.config import DecoderConfig, ModelConfig, VisionConfig
from train.config import GroupConfig, SourceConfig

FOLDER = "out/demo"
TOKENIZER = f"{FOLDER}/tokenizer"
WORLDS: dict[str, dict[str, Any]] = {  # what `lmm_jax.demo.dataset.write_dataset` draws in folders of that name
    "easy": {"images": 16000, "clips": 0, "seed": 100, "objects": (1, 1)},
    "world": {"images": 60000, "clips": 12000, "seed": 200, "turns": (4, 10)},
    "binding": {  # what is learnt last is asked more often
        "images": 60000,
        "clips": 0,
        "seed": 400,
        "turns": (4, 10),
        "times": {"relation": 3, "comparison": 2, "position": 2},
    },
    "clips": {"images": 0, "clips": 30000, "seed": 500, "turns": (4, 10)},
    "held_out": {"images": 608, "clips": 158, "seed": 300},
}


def model() -> ModelConfig:
    """3.1M parameters, 3.8M with compressor, pre-fusion and the CLIP block that is only exported: 7.6 MB in bfloat16."""
    vision = VisionConfig(128, 512, num_layers=6, num_heads=4, patch_size=8, image_size=64, name="")
    decoder = DecoderConfig(
        vocab_size=456,
        hidden_size=160,
        intermediate_size=480,
        num_layers=4,
        num_heads=5,
        num_kv_heads=5,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return ModelConfig(
        vision,
        decoder,
        compressor=None,
        prefusion_layers=0,
        template="llava_llama_3_1",
        bos_token_id=1,
        eos_token_ids=(7,),
        pad_token_id=3,
    )


def sources(world: str, *kinds: str, sampling: str = "all") -> tuple[SourceConfig, ...]:
    """Files of a generated world: captions, images, clip_captions, clips."""
    return tuple(SourceConfig(f"{FOLDER}/{world}/{kind}.json", sampling=sampling) for kind in kinds)


def everything(learning_rate: float, weight_decay: float = 0.0) -> tuple[GroupConfig, ...]:
    """All parameters alike."""
    return (GroupConfig(".*", learning_rate, weight_decay),)

"""python -m train configs/llava_v1_5_stage1_vicuna_7b.py

Stage 1 of LLaVA-v1.5 with Vicuna-7B, the baseline: as that of LLaVA-Mini, with LLaVA's own length and clipping.
The model to start from: python -m conversion from-hf --llm VICUNA --vision CLIP models/vicuna_7b_clip
"""

import dataclasses

from configs import stage1_vicuna_7b
from train.config import TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    run = stage1_vicuna_7b.get_config()
    return dataclasses.replace(
        run,
        folder="runs/llava_v1_5_stage1_vicuna_7b",
        data=dataclasses.replace(run.data, max_length=2048, buckets=(640, 768, 1024)),
        optimizer=dataclasses.replace(run.optimizer, clip=1.0),
    )

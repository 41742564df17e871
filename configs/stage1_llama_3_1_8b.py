"""python -m train configs/stage1_llama_3_1_8b.py

Stage 1 of LLaVA-Mini with LLaMA-3.1-8B: the projector alone learns to describe pictures, all 576 tokens of them.
The model to start from: python -m conversion from-hf --llm LLAMA --vision CLIP models/llama_3_1_8b_clip
"""

import dataclasses

from configs import stage1_vicuna_7b
from train.config import StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run: as with Vicuna."""
    return dataclasses.replace(
        stage1_vicuna_7b.get_config(),
        folder="runs/stage1_llama_3_1_8b",
        start=StartConfig(folder="models/llama_3_1_8b_clip", size="llava-v1.5-llama-3.1-8b"),
    )

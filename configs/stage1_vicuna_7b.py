"""python -m train configs/stage1_vicuna_7b.py

Stage 1 of LLaVA-Mini with Vicuna-7B: the projector alone learns to describe pictures, all 576 tokens of them.
The model to start from: python -m conversion from-hf --llm VICUNA --vision CLIP models/vicuna_7b_clip
"""

from configs.common import CAPTIONS, STAGE_1
from train.config import ComputeConfig, DataConfig, OptimizerConfig, StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run (spec section 10)."""
    return TrainConfig(
        folder="runs/stage1_vicuna_7b",
        start=StartConfig(folder="models/vicuna_7b_clip", size="llava-v1.5-7b"),
        data=DataConfig(
            mixture=CAPTIONS,
            template="plain",
            batch_size=256,
            epochs=1,
            max_length=4096,
            buckets=(640, 768, 1024, 2048),  # nearly all rows are a picture's 576 tokens and a short caption
        ),
        optimizer=OptimizerConfig(STAGE_1, warmup=0.03, clip=0.5),
        compute=ComputeConfig(dtype="bfloat16"),
    )

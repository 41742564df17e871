"""python -m train configs/stage2_llama_3_1_8b.py

Stage 2 of LLaVA-Mini with LLaMA-3.1-8B: instructions with pictures and with videos of 8 frames, one vision token per
picture or frame (spec sections 6 and 10). The mixture is an approximation, see there.
"""

import dataclasses

from configs import stage2_vicuna_7b
from configs.common import INSTRUCTIONS_AND_VIDEOS
from train.config import TrainConfig


def get_config() -> TrainConfig:
    """The run: as with Vicuna, and videos."""
    run = stage2_vicuna_7b.get_config()
    return dataclasses.replace(
        run,
        folder="runs/stage2_llama_3_1_8b",
        start=dataclasses.replace(run.start, folder="runs/stage1_llama_3_1_8b/model", size="llava-v1.5-llama-3.1-8b"),
        data=dataclasses.replace(run.data, mixture=INSTRUCTIONS_AND_VIDEOS, video_frames=8),
    )

"""python -m train configs/stage2_hd_vicuna_7b.py

Stage 2 of LLaVA-Mini-HD with Vicuna-7B: a picture is 2x2 tiles and the whole, compressed to 64 vision tokens (spec sections 2
to 4). Starts from the ordinary stage 1.
"""

import dataclasses

from configs import stage2_vicuna_7b
from train.config import TrainConfig


def get_config() -> TrainConfig:
    """The run: as in standard resolution."""
    run = stage2_vicuna_7b.get_config()
    return dataclasses.replace(
        run,
        folder="runs/stage2_hd_vicuna_7b",
        start=dataclasses.replace(run.start, compressor_size=8, resolution_ratio=2),
    )

"""python -m train configs/stage2_lora_vicuna_7b.py

Stage 2 of LLaVA-Mini with Vicuna-7B whose decoder learns by low-rank adapters, merged in the model folder. Projector,
compressor and pre-fusion layers learn whole. Rank, alpha and learning rates are those of LLaVA-v1.5's LoRA script.
"""

import dataclasses

from configs import stage2_vicuna_7b
from configs.common import STAGE_2_LORA
from train.config import LoraConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run: as without adapters, but for the decoder."""
    run = stage2_vicuna_7b.get_config()
    return dataclasses.replace(
        run,
        folder="runs/stage2_lora_vicuna_7b",
        optimizer=dataclasses.replace(run.optimizer, groups=STAGE_2_LORA),
        lora=LoraConfig(rank=128, alpha=256.0, targets=r"layers/.*_proj"),
    )

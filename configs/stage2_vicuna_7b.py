"""python -m train configs/stage2_vicuna_7b.py

Stage 2 of LLaVA-Mini with Vicuna-7B: instructions, with one vision token per picture. Compressor and four pre-fusion layers
are new; all but the vision encoder learns (spec section 10).
"""

from configs.common import INSTRUCTIONS, STAGE_2
from train.config import ComputeConfig, DataConfig, OptimizerConfig, StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run. How pre-fusion starts is not published: `prefusion_init` is a choice."""
    return TrainConfig(
        folder="runs/stage2_vicuna_7b",
        start=StartConfig(folder="runs/stage1_vicuna_7b/model", size="llava-v1.5-7b", compressor_size=1, prefusion_layers=4),
        data=DataConfig(mixture=INSTRUCTIONS, batch_size=256, epochs=2, max_length=4096),
        optimizer=OptimizerConfig(STAGE_2, warmup=0.03, clip=0.5),
        compute=ComputeConfig(dtype="bfloat16"),
    )

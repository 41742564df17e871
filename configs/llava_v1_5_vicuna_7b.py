"""python -m train configs/llava_v1_5_vicuna_7b.py

Stage 2 of LLaVA-v1.5 with Vicuna-7B, the baseline: no compressor and no pre-fusion, all 576 tokens of a picture go to the
decoder, which learns together with the projector. Starts from configs/llava_v1_5_stage1_vicuna_7b.py.
"""

from configs.common import DECODER, INSTRUCTIONS, PROJECTOR
from train.config import ComputeConfig, DataConfig, GroupConfig, OptimizerConfig, StartConfig, TrainConfig

GROUPS = (GroupConfig(f"{PROJECTOR}|{DECODER}", learning_rate=2e-5), GroupConfig("vision_tower/.*"))


def get_config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        folder="runs/llava_v1_5_vicuna_7b",
        start=StartConfig(folder="runs/llava_v1_5_stage1_vicuna_7b/model", size="llava-v1.5-7b", image_aspect_ratio="pad"),
        data=DataConfig(mixture=INSTRUCTIONS, batch_size=128, epochs=1, max_length=2048),
        optimizer=OptimizerConfig(GROUPS, warmup=0.03, clip=1.0),
        compute=ComputeConfig(dtype="bfloat16"),
    )

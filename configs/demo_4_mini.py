"""python -m train configs/demo_4_mini.py

The demo model's stage 2: compressor (one vision token per image) and pre-fusion layers are added; pictures and clips.
"""

import dataclasses

from configs import demo, demo_3_align
from train.config import GroupConfig, OptimizerConfig, RecordConfig, StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    before = demo_3_align.get_config()
    frozen = r"vision_tower/.*|compressor/pos_embed"
    groups = (GroupConfig(frozen), GroupConfig(rf"(?!{frozen}).*", 5e-4))
    return dataclasses.replace(
        before,
        folder=f"{demo.FOLDER}/4_mini",
        start=StartConfig(folder=f"{before.folder}/model", compressor_size=1, prefusion_layers=3),
        data=dataclasses.replace(
            before.data,
            template="",
            sources=(
                *demo.sources("world", "captions", sampling="first:8000"),
                *demo.sources("world", "images", sampling="end:30000"),
                *demo.sources("binding", "images"),  # pictures not seen before
                *demo.sources("world", "clip_captions", sampling="first:4000"),
                *demo.sources("world", "clips"),
            ),
            buckets=demo.MINI_BUCKETS,
        ),
        optimizer=OptimizerConfig(groups, final=0.05, clip=1.0, b2=0.98, method="muon"),
        held_out=dataclasses.replace(before.held_out, sources=demo.sources("held_out", "images", "clips"), answers=8),
        record=RecordConfig(checkpoint_minutes=5.0, checkpoint_steps=0, log_steps=25, model_dtype="bfloat16"),
    )

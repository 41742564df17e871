"""python -m train configs/demo_6_mini.py

The demo model's stage 2 ends: questions about pictures and clips, into which pre-fusion puts what they show.
"""

import dataclasses

from configs import demo, demo_5_clips
from train.config import StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    before = demo_5_clips.get_config()
    return dataclasses.replace(
        before,
        folder=f"{demo.FOLDER}/6_mini",
        start=StartConfig(folder=f"{before.folder}/model"),
        data=dataclasses.replace(
            before.data,
            template="",
            sources=(
                *demo.sources("world", "captions", sampling="first:2000"),
                *demo.sources("binding", "images"),
                *demo.sources("clips", "clip_captions", sampling="first:2000"),
                *demo.sources("clips", "clips", sampling="first:24000"),
            ),
            buckets=(48, 72, 104, 136, 168, 208),
        ),
        optimizer=dataclasses.replace(before.optimizer, warmup=0.02, final=0.05),
        held_out=dataclasses.replace(before.held_out, sources=demo.sources("held_out", "images", "clips"), answers=8),
    )

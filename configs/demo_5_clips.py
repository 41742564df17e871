"""python -m train configs/demo_5_clips.py

The demo model's stage 2 goes on: what happens in clips, told from one token per frame.
"""

import dataclasses

from configs import demo, demo_4_token
from train.config import StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    before = demo_4_token.get_config()
    return dataclasses.replace(
        before,
        folder=f"{demo.FOLDER}/5_clips",
        start=StartConfig(folder=f"{before.folder}/model"),
        data=dataclasses.replace(
            before.data,
            sources=(
                *demo.sources("clips", "clip_captions"),
                *demo.sources("world", "clip_captions"),
                *demo.sources("world", "captions", sampling="end:6000"),
            ),
            buckets=(32, 48, 72),
        ),
        optimizer=dataclasses.replace(before.optimizer, warmup=0.01, final=1.0),
        held_out=dataclasses.replace(before.held_out, sources=demo.sources("held_out", "captions", "clip_captions")),
    )

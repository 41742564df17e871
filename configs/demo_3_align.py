"""python -m train configs/demo_3_align.py

The demo model's stage 1: captions, only the projector is trained.
"""

import dataclasses

from configs import demo, demo_2_world
from train.config import GroupConfig, OptimizerConfig, StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    before = demo_2_world.get_config()
    groups = (GroupConfig(r"mm_projector/.*", 5e-4), GroupConfig(r"(?!mm_projector/).*"))
    return dataclasses.replace(
        before,
        folder=f"{demo.FOLDER}/3_align",
        start=StartConfig(folder=f"{before.folder}/model"),
        data=dataclasses.replace(
            before.data, template="plain", sources=demo.sources("world", "captions", sampling="first:8000")
        ),
        optimizer=OptimizerConfig(groups, clip=0.5, method="muon"),
        held_out=dataclasses.replace(before.held_out, sources=demo.sources("held_out", "captions"), answers=0),
    )

"""python -m train configs/demo_7_finish.py

The demo model's last run: once more over questions, with clips it has not been asked about before.
"""

import dataclasses

from configs import demo, demo_6_mini
from train.config import StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    before = demo_6_mini.get_config()
    frozen, trained = before.optimizer.groups
    groups = (frozen, dataclasses.replace(trained, learning_rate=3e-4))
    return dataclasses.replace(
        before,
        folder=f"{demo.FOLDER}/7_finish",
        max_steps=900,
        start=StartConfig(folder=f"{before.folder}/model"),
        data=dataclasses.replace(
            before.data,
            sources=(
                *demo.sources("binding", "images", sampling="random:20000"),
                *demo.sources("world", "clips"),
                *demo.sources("clips", "clips", sampling="end:12000"),
            ),
        ),
        optimizer=dataclasses.replace(before.optimizer, groups=groups, warmup=0.03, final=0.02),
    )

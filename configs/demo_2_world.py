"""python -m train configs/demo_2_world.py

The demo model's second run: encoder and decoder on scenes of up to five objects, still with all vision tokens.
"""

import dataclasses

from configs import demo, demo_1_easy
from train.config import OptimizerConfig, StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    easy = demo_1_easy.get_config()
    return dataclasses.replace(
        easy,
        folder=f"{demo.FOLDER}/2_world",
        start=StartConfig(folder=f"{easy.folder}/model"),
        data=dataclasses.replace(easy.data, sources=demo.sources("world", "captions", "images"), epochs=2),
        optimizer=OptimizerConfig(demo.everything(5e-4), final=0.1, warmup=0.02, clip=1.0, b2=0.98, method="muon"),
    )

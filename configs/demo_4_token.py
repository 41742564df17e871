"""python -m train configs/demo_4_token.py

The demo model's stage 2 begins: compressor (one vision token per image) and pre-fusion layers are added and learn to say
what is in a picture. There is no question to put the picture into, so the one token has to hold all of it; a video, of
whose frames the questions see but the mean, will depend on that.
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
        folder=f"{demo.FOLDER}/4_token",
        start=StartConfig(folder=f"{before.folder}/model", compressor_size=1, prefusion_layers=3),
        data=dataclasses.replace(
            before.data,
            sources=(*demo.sources("world", "captions"), *demo.sources("binding", "captions")),
            epochs=1,
            buckets=(24, 32, 48, 72),
        ),
        optimizer=OptimizerConfig(groups, final=0.3, clip=1.0, b2=0.98, method="muon"),
        held_out=dataclasses.replace(before.held_out, every=250),
        record=RecordConfig(checkpoint_minutes=5.0, checkpoint_steps=0, log_steps=25, model_dtype="bfloat16"),
    )

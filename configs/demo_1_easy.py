"""python -m train configs/demo_1_easy.py

The demo model's first steps: encoder and decoder from nothing, all vision tokens, captions of single objects.
"""

from configs import demo
from train.config import ComputeConfig, DataConfig, HeldOutConfig, OptimizerConfig, RecordConfig, StartConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        f"{demo.FOLDER}/1_easy",
        start=StartConfig(scratch=demo.model(), tokenizer=demo.TOKENIZER),
        data=DataConfig(
            sources=demo.sources("easy", "captions"),
            batch_size=32,
            max_length=352,
            buckets=(92, 104, 112, 128, 144, 160, 192, 224, 256, 288),
            threads=2,
            prefetch=2,
        ),
        optimizer=OptimizerConfig(demo.everything(5e-4), final=0.5, clip=1.0, b2=0.98, method="muon"),
        compute=ComputeConfig(remat="none"),
        held_out=HeldOutConfig(sources=demo.sources("held_out", "images"), every=500, batches=8, answers=6),
        record=RecordConfig(checkpoint_minutes=5.0, checkpoint_steps=0, log_steps=25),
    )

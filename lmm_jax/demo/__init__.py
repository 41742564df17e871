"""The small visual world: pictures, clips, questions and a tokenizer from which a small model is trained from nothing."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"  # trained by examples/train_demo.py; what `lmm ask` uses where no model is named

"""The small visual world: pictures, clips, questions and a tokenizer from which a small model is trained from nothing.

That model comes with the package: MODEL is its folder.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"

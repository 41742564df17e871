"""The small visual world: pictures, clips, questions and a tokenizer from which a small model is trained from nothing."""

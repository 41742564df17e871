"""Move checkpoints between Hugging Face format and the model folders of lmm-jax."""

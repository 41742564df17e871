"""One short file per run: `get_config() -> TrainConfig`, its first line the command that starts it."""

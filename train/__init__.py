"""Training: two stages, from conversations to a model that answers."""

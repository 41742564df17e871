"""The model in Flax Linen; nothing else imports flax.linen."""

"""Next-token cross-entropy, unreduced over devices: a sum and a count (spec section 5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmm_jax.config import IGNORE_LABEL


def next_token_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each label under the logits one position before it.

    Args:
      logits: (B,T,vocab) float32.
      labels: (B,T) int32, IGNORE_LABEL where nothing is to be predicted.

    Returns:
      Sum in nats and number of labels, both () float32: their quotient is the mean over any union of batches.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    valid = labels != IGNORE_LABEL
    picked = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(losses, where=valid), valid.sum().astype(jnp.float32)

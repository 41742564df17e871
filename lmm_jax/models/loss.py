"""Next-token cross-entropy, unreduced over devices: a sum and a count (spec section 5).

Axis letters: B rows, T positions, Q labelled positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable

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
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of cross-entropies in nats and number of targets: logits (B,Q,vocab) float32, targets (B,Q) int32."""
    valid = targets != IGNORE_LABEL
    picked = jnp.take_along_axis(logits, jnp.where(valid, targets, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(losses, where=valid), valid.sum().astype(jnp.float32)


def chunked_cross_entropy(
    logits_of: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` of which logits for `chunk` positions of each row exist at a time, also in the backward pass.

    Args:
      logits_of: (B,q,D) -> (B,q,vocab) float32.
      hidden: (B,Q,D).
      targets: (B,Q) int32, IGNORE_LABEL where nothing is to be predicted.
      chunk: q.
    """
    part = jax.checkpoint(lambda h, t: cross_entropy(logits_of(h), t))
    length = hidden.shape[1]
    if length <= chunk:
        return part(hidden, targets)
    whole = length - length % chunk

    def add(totals: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        new = part(*(jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (hidden, targets)))
        return (totals[0] + new[0], totals[1] + new[1]), None

    zero = jnp.zeros((), jnp.float32)
    totals, _ = jax.lax.scan(add, (zero, zero), jnp.arange(0, whole, chunk))
    if whole < length:
        new = part(hidden[:, whole:], targets[:, whole:])
        totals = (totals[0] + new[0], totals[1] + new[1])
    return totals

"""Choosing the next token: greedy, temperature, top-k, top-p; each row with its own settings and random stream.

Axis letters: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lmm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one answer is generated.

    Attributes:
      max_new_tokens: at most so many, the end token included.
      temperature: 0 is greedy.
      top_p: keep the most probable tokens until their probability reaches this.
      top_k: keep so many most probable tokens; 0 keeps all.
      seed: of the row's random stream; the same seed gives the same answer, alone or in a batch.
      ignore_eos: go on after an end token, up to max_new_tokens; to measure with.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or not least <= value < 2**31:
                raise UserError(f"{name} is {value}: it must be a whole number from {least} to {2**31 - 1}")
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; if not, the most probable one is taken."""
        return self.temperature > 0


@struct.dataclass
class Sampler:
    """Settings of a batch: temperature, top_p (B,) float32; top_k (B,) int32; seed (B,) uint32; ignore_eos (B,) bool.

    Where no row draws, all but the last are None, and programs have no code for them, which takes long to compile.
    """

    temperature: jax.Array | None
    top_p: jax.Array | None
    top_k: jax.Array | None
    seed: jax.Array | None
    ignore_eos: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sampling], draws: bool = True) -> Sampler:
        """One setting per row; `draws` tells whether any of them, or of those that will take their place, may draw.

        Raises ValueError where one does and none may.
        """
        ignore_eos = np.array([r.ignore_eos for r in rows], bool)
        if not draws:
            if any(r.draws for r in rows):
                raise ValueError("a row draws its tokens among rows that take the most probable ones")
            return cls(None, None, None, None, ignore_eos)
        return cls(
            np.array([r.temperature for r in rows], np.float32),
            np.array([r.top_p for r in rows], np.float32),
            np.array([r.top_k for r in rows], np.int32),
            np.array([r.seed for r in rows], np.uint32),
            ignore_eos,
        )


def sample(logits: jax.Array, sampler: Sampler, step: jax.Array) -> jax.Array:
    """Next tokens (B,) int32 from logits (B,V) float32; `step` (B,) int32 counts each row's tokens so far."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampler.temperature is None:
        return greedy

    def drawn() -> jax.Array:
        return jnp.where(sampler.temperature > 0, jax.vmap(_draw)(logits, sampler, step), greedy)

    return jax.lax.cond((sampler.temperature > 0).any(), drawn, lambda: greedy)  # the sort is not paid when all is greedy


def _draw(logits: jax.Array, sampler: Sampler, step: jax.Array) -> jax.Array:
    """One row: logits (V,)."""
    order = jnp.argsort(-logits)  # stable: ties keep the vocabulary's order
    ranked = logits[order] / jnp.where(sampler.temperature > 0, sampler.temperature, 1.0)
    rank = jnp.arange(len(ranked))
    ranked = jnp.where((sampler.top_k > 0) & (rank >= sampler.top_k), -jnp.inf, ranked)
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability) - probability  # mass of all more probable tokens
    ranked = jnp.where((rank > 0) & (before >= sampler.top_p), -jnp.inf, ranked)
    key = jax.random.fold_in(jax.random.key(sampler.seed), step)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)

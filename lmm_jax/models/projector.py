"""`mlp2x_gelu`: vision width to decoder width (spec section 3)."""

from __future__ import annotations

import jax
from flax import linen as nn

from lmm_jax.models.layers import Proj


class Projector(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    inputs: int
    outputs: int

    def setup(self) -> None:
        """Declares the two projections."""
        self.linear_1 = Proj((self.inputs,), (self.outputs,), bias=True)
        self.linear_2 = Proj((self.outputs,), (self.outputs,), bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (…, Dv) -> (…, D)."""
        return self.linear_2(nn.gelu(self.linear_1(x), approximate=False))

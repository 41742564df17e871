"""Parameters as inference on a processor wants them: every layer's apart, and large kernels with their outputs first.

There XLA copies a layer out of the stack before it multiplies with it, which costs more than the product with a few rows; and
it multiplies few rows up to twice as fast with a kernel whose inputs lie side by side. So

    a stack's leaf (L, …)     becomes a tuple of L leaves (…); the layers are then unrolled, not scanned
    a kernel (in…, out…)      becomes {"turned": (out, in)}, with one axis for all outputs and one for all inputs

Small models keep their stacks, for their programs compile faster. Theirs are made whole, L layers and not L−1: `last` is there
as well, for those programs that run it for fewer positions; what runs all layers alike compiles one.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmm_jax.sharding import leaf_paths, platform

LARGE = 2**27  # bytes of all parameters from which on this is worth its time
FEW = 512  # rows up to which a product is taken kernel first

_TURNED = re.compile(r"(?:(?:layers|prefusion_layers)/(?:stack|last)/.*_proj|mm_projector/\w+|lm_head)/kernel")


def is_wanted(abstract: Any, mesh: Mesh) -> bool:
    """Whether inference with parameters of these shapes and dtypes should have them in this form."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    return is_lone_processor(mesh) and size >= LARGE


def is_lone_processor(mesh: Mesh) -> bool:
    """Whether the mesh is one processor, whose parameters are not split."""
    return mesh.size == 1 and platform(mesh) == "cpu"


def as_loaded(params: Any, mesh: Mesh) -> Any:
    """The whole parameter tree, as it is trained, in the form in which `inference.loading` has it on a mesh."""
    if not is_lone_processor(mesh):
        return params
    arrays, large = leaf_paths(params), is_wanted(params, mesh)

    def form(path: str, leaf: jax.Array) -> Any:
        last = arrays.get(path.replace("/stack/", "/last/")) if "/stack/" in path else None
        if large:
            return tuple(turn(path, leaf[i]) for i in range(len(leaf))) if "/stack/" in path else turn(path, leaf)
        return leaf if last is None else jnp.concatenate([leaf, last[None]])

    return jax.tree.unflatten(jax.tree.structure(params), [form(path, leaf) for path, leaf in arrays.items()])


def turn(path: str, leaf: jax.Array, transpose: Callable[[jax.Array], jax.Array] = jnp.transpose) -> Any:
    """A leaf, or one layer of a stack's, in this form; `path` as "layers/stack/mlp/up_proj/kernel"."""
    if not _TURNED.fullmatch(path):
        return leaf
    inputs = 2 if "/o_proj/" in path else 1
    matrix = leaf.reshape(math.prod(leaf.shape[:inputs]), -1)
    return {"turned": transpose(matrix)}


def is_turned(kernel: Any) -> bool:
    """Whether a kernel has its outputs first."""
    return isinstance(kernel, Mapping) and "turned" in kernel


def project(x: jax.Array, kernel: Mapping[str, jax.Array], inputs: int, outputs: Sequence[int], dtype: Any) -> jax.Array:
    """x (…, in…) times a turned kernel with so many input axes -> (…, *outputs), in `dtype`, or that of x where it is None."""
    batch = x.shape[: x.ndim - inputs]
    rows, matrix = x.reshape(math.prod(batch), -1), kernel["turned"].astype(x.dtype)
    by_inputs = functools.partial(
        jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    if len(rows) > FEW:
        y = by_inputs(rows, matrix)
    else:  # XLA packs the right side anew for each product: let it be the smaller one; unhindered, it turns this round
        y = jax.lax.optimization_barrier(by_inputs(matrix, rows)).T
    return y.reshape(*batch, *outputs)


def layer(stack: Any, number: int | jax.Array) -> Any:
    """The parameters of one layer of a stack, whichever form it has; `number` () int32 only where the layers are stacked."""

    def one(leaf: Any) -> jax.Array:
        return leaf[number] if isinstance(leaf, tuple) else jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)

    return jax.tree.map(one, stack, is_leaf=lambda leaf: isinstance(leaf, tuple))


def is_apart(params: Any) -> bool:
    """Whether the layers in a part of the parameter tree lie apart."""
    return any(isinstance(x, tuple) for x in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, tuple)))


def is_whole(params: Any, length: int) -> bool:
    """Whether a stack's parameters (L or L−1, …) have all `length` layers."""
    leaves = jax.tree.leaves(params)
    return bool(leaves) and leaves[0].shape[0] == length

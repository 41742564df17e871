"""One step of training, a pure function (spec sections 4, 5, 6 and 10).

    trained ─┐                                        ┌─ Σ over parts: gradients, loss, tokens ─ clip ─ AdamW ─► trained
    frozen ──┴─► encode_image ─ fuse_text ─ decode ───┘

Gradients are taken of the *sum* of all cross-entropies and divided by the number of labels of the global batch, so that
every token counts the same however the batch is cut over devices and parts.

Axis letters: B rows, n images of a row, N = B·n, P tiles, H,W pixels, T decoder positions, I instruction tokens, Q labelled
positions, V vision tokens per image, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange, repeat
from flax import struct, traverse_util

from lmm_jax.models.llava_mini import LlavaMini
from lmm_jax.models.loss import chunked_cross_entropy
from lmm_jax.sharding import constrain

Params = dict[str, jax.Array]  # flat: path -> leaf
Arrays = dict[str, jax.Array]  # a batch, see `data.Batch`


@struct.dataclass
class TrainState:
    """What changes, or could, from step to step.

    Attributes:
      step: () int32, updates made; with the run's seeds it is the whole random state: the order of the data is a function of
        both, and nothing else is drawn while training.
      trained: parameters with gradients, in `compute.trained_dtype`.
      frozen: the others, in `compute.frozen_dtype`.
      optimizer: state for `trained` only.
    """

    step: jax.Array
    trained: Params
    frozen: Params
    optimizer: optax.OptState


def join(trained: Params, frozen: Params) -> Any:
    """The nested tree that the model takes."""
    return traverse_util.unflatten_dict({**trained, **frozen}, sep="/")


def decoder_input(model: LlavaMini, params: Any, batch: Arrays) -> jax.Array:
    """A batch -> the decoder's input (B,T,D). Rows of one batch have the same number of images."""
    call = functools.partial(model.apply, {"params": params})
    if "pixels" not in batch:
        return call(batch["ids"], None, batch["fused_index"], method="place_text")
    n, fused = batch["pixels"].shape[1], None
    pixels = constrain(rearrange(batch["pixels"], "b n p h w c -> (b n) p h w c"), "batch", None, None, None, None)
    prefix = call(pixels, method="encode_image")
    if model.config.prefusion_layers:
        text = repeat(call(batch["fused_ids"], method="embed"), "b i d -> (b n) i d", n=n)
        each = rearrange(call(text, prefix, method="fuse_text"), "(b n) i d -> b n i d", n=n)
        fused = each.astype(jnp.float32).mean(axis=1)  # over images or frames, spec sections 5 and 6
    x = call(batch["ids"], fused, batch["fused_index"], method="place_text")
    tokens = rearrange(prefix.tokens, "(b n) v d -> b (n v) d", n=n)
    return call(x, tokens, batch["vision_index"], method="place_vision")


def loss_sum(model: LlavaMini, chunk: int, params: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of a batch's labels in nats, and their number."""
    x = decoder_input(model, params, batch)
    hidden, _ = model.apply({"params": params}, x, queries=batch["queries"], method="hidden")

    def logits_of(h: jax.Array) -> jax.Array:
        return model.apply({"params": params}, h, method="logits")

    return chunked_cross_entropy(logits_of, hidden, batch["targets"], chunk)


def gradients(
    model: LlavaMini, chunk: int, parts: int, trained: Params, frozen: Params, batch: Arrays
) -> tuple[jax.Array, jax.Array, Params]:
    """Loss (mean over labels), their number, and the gradient of the mean in float32.

    With `parts` > 1 the rows are taken in that many parts, one after the other; each device keeps its own rows.
    """

    def summed(trained: Params, part: Arrays) -> tuple[jax.Array, jax.Array]:
        return loss_sum(model, chunk, join(trained, frozen), part)

    take = jax.value_and_grad(summed, has_aux=True)
    if parts == 1:
        (total, count), grads = take(trained, batch)
    else:
        cut = {k: rearrange(v, "(b a) ... -> a b ...", a=parts) for k, v in batch.items() if v.ndim > 1}
        cut = {k: constrain(v, None, "batch", *[None] * (v.ndim - 2)) for k, v in cut.items()}

        def add(carry: tuple, part: Arrays) -> tuple[tuple, None]:
            (total, count), grads = take(trained, part)
            return jax.tree.map(jnp.add, carry, (total, count, grads)), None

        zero = jnp.zeros((), jnp.float32)
        sums = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), trained)
        (total, count, grads), _ = jax.lax.scan(add, (zero, zero, sums), cut)
    whole = jnp.maximum(count, 1.0)
    return total / whole, count, jax.tree.map(lambda g: g.astype(jnp.float32) / whole, grads)


def init_optimizer(optimizer: optax.GradientTransformation) -> Callable[[Params], optax.OptState]:
    """Trained parameters -> state. Moments are float32 whatever the parameters are: 0.999 is 1 in bfloat16."""
    return lambda trained: optimizer.init(optax.tree.cast(trained, jnp.float32))


def train_step(
    model: LlavaMini, optimizer: optax.GradientTransformation, chunk: int, parts: int, state: TrainState, batch: Arrays
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      model: with the run's dtype and rematerialisation.
      optimizer: from `make_optimizer`.
      chunk: labelled positions of a row that meet the vocabulary at once.
      parts: of gradient accumulation.
      state: is donated by the loop.
      batch: `data.Batch.arrays` of the whole global batch.

    Returns:
      The new state, and () float32 each: loss, grad_norm (before clipping), labels, and the sum of everything in the batch
      that has one axis (numbers per row: lengths, used, skipped; wishes): so processes agree on what some of them saw.
    """
    loss, count, grads = gradients(model, chunk, parts, state.trained, state.frozen, batch)
    updates, new = optimizer.update(grads, state.optimizer, optax.tree.cast(state.trained, jnp.float32))
    trained = optax.apply_updates(state.trained, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "labels": count}
    metrics |= {name: numbers.sum().astype(jnp.float32) for name, numbers in batch.items() if numbers.ndim == 1}
    return TrainState(state.step + 1, trained, state.frozen, new), metrics


def eval_step(model: LlavaMini, chunk: int, trained: Params, frozen: Params, batch: Arrays) -> tuple[jax.Array, ...]:
    """`loss_sum` with the parameters of a state, and the number of records that could not be read."""
    return *loss_sum(model, chunk, join(trained, frozen), batch), batch["skipped"].sum()

"""What a training step asks of its devices, and the least time it can take: planned, nothing is compiled or run.

Times are bounds: every device computes at its peak, receives over all its links at once, and exchanges while it computes. A
real step takes longer; one whose exchange takes longer than its products cannot be helped by better overlap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from lmm_jax.analysis import program
from lmm_jax.analysis.program import Collective
from lmm_jax.analysis.rehearsal import device_bytes
from lmm_jax.errors import UserError
from train.data import empty_arrays
from train.flops import model_flops
from train.hardware import Chip
from train.plan import Bucket
from train.setup import Setup, abstract_state
from train.step import Arrays, Params, TrainState, gradients, join, loss_sum

STEPS = 1000  # of a run; the schedule's length changes no shape


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is, on whatever mesh.

    Attributes:
      model_flops: what the model needs, see `train.flops`.
      executed_flops: what the program does, with everything that is computed a second time.
      kept_bytes: activations that wait for the backward pass, of all rows that are computed at once.
      logits_bytes: float32 logits and their gradient, of the same rows.
      parts: computed one after the other.
    """

    model_flops: float
    executed_flops: float
    kept_bytes: float
    logits_bytes: float
    parts: int

    def in_parts(self, parts: int) -> Work:
        """The same step with other accumulation: that much of the rows is computed at once."""
        share = self.parts / parts
        kept, logits = share * self.kept_bytes, share * self.logits_bytes
        return dataclasses.replace(self, kept_bytes=kept, logits_bytes=logits, parts=parts)


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one device that are there between steps, and the batch.

    Attributes:
      trained, frozen: parameters.
      optimizer: its state.
      batch: the rows of a step.
    """

    trained: int
    frozen: int
    optimizer: int
    batch: int

    @property
    def total(self) -> int:
        """Of all four."""
        return self.trained + self.frozen + self.optimizer + self.batch


@dataclasses.dataclass(frozen=True)
class Bound:
    """Least seconds of a step, and what it shares out to.

    Attributes:
      compute: products at the peak.
      memory: state and activations read and written once.
      exchange: received over all links.
      mfu: most of the peak that the model's own FLOPs can take.
    """

    compute: float
    memory: float
    exchange: float
    mfu: float

    @property
    def step(self) -> float:
        """Seconds; all three go on at the same time."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def likely(self) -> float:
        """Seconds to compare by: halfway between exchanging while computing and exchanging alone."""
        return (self.step + max(self.compute, self.memory) + self.exchange) / 2


def bucket(setup: Setup, images: int, length: int) -> Bucket:
    """A batch of `length` positions whose text is half instructions, half answers, but all answers without pre-fusion.

    Raises:
      UserError: the run allows no such length, or the images leave no room for text.
    """
    config, most = setup.model.config, setup.config.data.max_length
    text = length - images * config.tokens_per_image
    if length > most or text < 2:
        raise UserError(
            f"{images} images take {images * config.tokens_per_image} of {length} positions, and data.max_length is {most}: "
            "choose other --images or --length"
        )
    fused = text // 2 if images and config.prefusion_layers else 1
    return Bucket(images, length, fused, text - fused)


def abstract_batch(setup: Setup, shape: Bucket) -> Arrays:
    """Shapes, dtypes and shardings of a global batch."""
    rows = setup.config.data.batch_size

    def of(array: jax.Array) -> jax.ShapeDtypeStruct:
        shape = (rows, *array.shape[1:])
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=setup.batch_sharding(shape))

    return jax.tree.map(of, empty_arrays(shape, 1, setup.model.config))


def planned_state(setup: Setup) -> TrainState:
    """Shapes, dtypes and shardings of what a run keeps."""
    return abstract_state(setup, STEPS)


def work(setup: Setup, shape: Bucket) -> Work:
    """What a step of such a batch is."""
    c, model = setup.config, setup.model
    state, batch = planned_state(setup), abstract_batch(setup, shape)
    rows, parts = c.data.batch_size, c.optimizer.accumulation

    def take(trained: Params, frozen: Params, batch: Arrays) -> object:
        return gradients(model, c.compute.loss_chunk, parts, trained, frozen, batch)

    def kept(batch: Arrays, trained: Params, frozen: Params) -> list[jax.Array]:
        def loss(trained: Params) -> jax.Array:
            return loss_sum(model, c.compute.loss_chunk, join(trained, frozen), batch)[0]

        return jax.tree.leaves(jax.vjp(loss, trained)[1])

    of_part = {k: jax.ShapeDtypeStruct((rows // parts, *x.shape[1:]), x.dtype) for k, x in batch.items()}
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
        executed = program.flops(jax.make_jaxpr(take)(state.trained, state.frozen, batch).jaxpr)
        residuals = jax.make_jaxpr(kept)(of_part, state.trained, state.frozen).jaxpr
    sizes = {"length": shape.length, "fused": shape.fused, "targets": shape.targets}
    needed = model_flops(model.config, rows=rows, images=shape.images, **sizes, trained=setup.trained.__contains__)
    logits = 2 * 4 * rows // parts * min(shape.targets, c.compute.loss_chunk) * model.config.decoder.vocab_size
    return Work(needed, executed, program.dependent_bytes(residuals, len(of_part)), logits, parts)


def held(state: TrainState, batch: Arrays) -> Held:
    """What a device holds of them, from `planned_state` and `abstract_batch`."""
    return Held(*(sum(map(device_bytes, jax.tree.leaves(x))) for x in (state.trained, state.frozen, state.optimizer, batch)))


def bound(chip: Chip, devices: int, work: Work, held: Held, exchanged: float, seconds: float) -> Bound:
    """The least time of a step on so many chips, each of which receives `exchanged` bytes in `seconds`.

    Touched are at least: the state, read and written; what is received and what is kept, both written and read.
    """
    compute = work.executed_flops / devices / chip.flops
    touched = 2 * (held.trained + held.optimizer) + held.frozen + held.batch
    touched += 2 * exchanged + 2 * work.parts * work.kept_bytes / devices
    memory = touched / chip.bandwidth
    return Bound(compute, memory, seconds, work.model_flops / devices / chip.flops / max(compute, memory, seconds))


def receiving(chip: Chip, exchanged: Iterable[Collective], stride: int = 1) -> float:
    """Least seconds of exchanges, one after the other.

    Args:
      chip: of all devices.
      exchanged: what each device receives.
      stride: distance of neighbours in a group, in the order of devices, `chip.island` of which are joined by links.
    """
    total = 0.0
    for c in exchanged:
        inside = max(1, min(c.group, chip.island // stride))  # members of a group on one island: they share what comes in
        outside = (1 - inside / c.group) / (1 - 1 / c.group) if c.group > 1 else 0.0
        total += max(c.received / chip.links, c.received * outside / inside / chip.network)
    return total


def itemsize(setup: Setup) -> int:
    """Bytes of a number of the trained parameters."""
    return jnp.dtype(setup.config.compute.trained_dtype).itemsize

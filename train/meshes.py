"""Which meshes a run could have on so many chips, and what each would cost: estimated, nothing is compiled.

    parameters   each of two passes over the layers brings a device those of the others of its fsdp axis
    gradients    go back to their owners over fsdp, and are summed over data
    activations  are summed over tensor, twice in a layer and pass

`compile` checks the estimates against the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lmm_jax import sharding
from lmm_jax.analysis.program import Collective
from lmm_jax.config import ModelConfig
from lmm_jax.errors import UserError
from train import roofline
from train.config import TrainConfig
from train.hardware import Chip
from train.plan import Bucket
from train.roofline import Bound, Held, Work
from train.setup import Setup, plan
from train.step import TrainState

TENSOR = (1, 2, 4, 8)  # sizes of the tensor axis that are tried
ROOM = 0.9  # of a chip's memory that an estimate may fill


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh.

    Attributes:
      mesh: as `compute.mesh` takes it.
      held: bytes of one device between steps.
      kept: bytes of one device that wait for the backward pass.
      working: bytes of one device for gradients, in float32, and logits.
      bound: least time of a step.
      exchanged: what is received.
      fits: whether all of it takes at most `ROOM` of the memory.
    """

    mesh: str
    held: Held
    kept: float
    working: float
    bound: Bound
    exchanged: list[Collective]
    fits: bool

    @property
    def bytes(self) -> float:
        """Of one device, all together."""
        return self.held.total + self.kept + self.working


def abstract_mesh(spec: str, chip: Chip) -> AbstractMesh:
    """A mesh of chips that need not be here; good for all but compiling. Raises as `sharding.make_mesh`."""
    sizes = sharding.mesh_sizes(spec)
    platform = "tpu" if chip.shapes else "gpu"
    device = AbstractDevice(device_kind=chip.kind, num_cores=1, platform=platform)
    axes = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axes, abstract_device=device)


def specs(config: TrainConfig, devices: int) -> Iterator[str]:
    """Meshes of all devices whose rows come out even; the plainest first."""
    rows = config.data.batch_size // config.optimizer.accumulation
    for tensor in TENSOR:
        shared = devices // tensor
        if devices % tensor or rows % shared:
            continue
        for data in (n for n in range(1, shared + 1) if shared % n == 0):
            yield f"data={data},fsdp={shared // data},tensor={tensor}"


def candidates(
    config: TrainConfig, sizes: ModelConfig, chip: Chip, devices: int, shape: Bucket, work: Work
) -> list[Candidate]:
    """All meshes, or the one that `config` names, the fastest that fits first; those that do not fit last.

    Raises:
      UserError: see `plan`; the mesh is none of so many devices; no mesh shares the rows evenly.
    """
    named = config.compute.mesh
    if named and math.prod(sharding.mesh_sizes(named).values()) != devices:
        raise UserError(f"mesh {named!r} is not one of {devices} devices: choose sizes with that product, or none")
    wanted = [named] if named else list(specs(config, devices))
    if not wanted:
        raise UserError(
            f"no mesh of {devices} devices shares {config.data.batch_size} rows in {config.optimizer.accumulation} parts "
            "evenly: change data.batch_size or optimizer.accumulation"
        )
    found = [candidate(spec, plan(config, sizes, abstract_mesh(spec, chip)), shape, chip, work) for spec in wanted]
    return sorted(found, key=lambda c: (not c.fits, c.bound.step, c.bound.exchange, c.bytes))


def candidate(spec: str, setup: Setup, shape: Bucket, chip: Chip, work: Work) -> Candidate:
    """The estimate for one mesh."""
    state, mesh = roofline.planned_state(setup), setup.mesh
    held = roofline.held(state, roofline.abstract_batch(setup, shape))
    shared, tensor = sharding.batch_multiple(mesh), mesh.shape["tensor"]
    kept = work.kept_bytes / shared
    gradients = (2 if work.parts > 1 else 1) * held.trained * 4 / roofline.itemsize(setup)
    working = gradients + work.logits_bytes / shared / tensor
    exchanged = exchanges(setup, state, shape)
    strides = {"data": mesh.shape["fsdp"] * tensor, "fsdp": tensor, "tensor": 1}
    seconds = sum(roofline.receiving(chip, of, strides[axis]) for axis, of in exchanged.items())
    found = [c for of in exchanged.values() for c in of]
    bound = roofline.bound(chip, mesh.size, work, held, sum(c.received for c in found), seconds)
    fits = held.total + kept + working <= ROOM * chip.memory
    return Candidate(spec, held, kept, working, bound, found, fits)


def exchanges(setup: Setup, state: TrainState, shape: Bucket) -> dict[str, list[Collective]]:
    """What every device receives in a step, by axis of the mesh."""
    mesh = setup.mesh
    data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.MESH_AXES)
    parts, width = setup.config.optimizer.accumulation, setup.model.dtype.itemsize
    found: dict[str, list[Collective]] = {axis: [] for axis in sharding.MESH_AXES}
    trained = sum(map(_on_tensor, state.trained.values())) * width
    if fsdp > 1:
        whole = sum(
            _on_tensor(leaf) * width * _passes(setup, path, shape)
            for path, leaf in {**state.trained, **state.frozen}.items()
            if "fsdp" in _axes(leaf)
        )
        others = parts * (1 - 1 / fsdp)
        found["fsdp"] += [Collective("all-gather", fsdp, others * whole, 0)]
        found["fsdp"] += [Collective("reduce-scatter", fsdp, others * trained, 0)]
    if data > 1:
        found["data"] += [Collective("all-reduce", data, parts * 2 * trained / fsdp * (1 - 1 / data), 0)]
    if tensor > 1:
        summed = _summed(setup, shape) * setup.config.data.batch_size / (data * fsdp) * width
        found["tensor"] += [Collective("all-reduce", tensor, 2 * summed * (1 - 1 / tensor), 0)]
    return found


def _passes(setup: Setup, path: str, shape: Bucket) -> int:
    """How often a parameter is gathered: forward, backward with what is computed again; the vocabulary for every chunk."""
    if path.startswith("vision_tower") and not any(name.startswith("vision_tower") for name in setup.trained):
        return 1
    chunks = math.ceil(shape.targets / setup.config.compute.loss_chunk) if path.startswith("lm_head") else 1
    return 2 * chunks


def _summed(setup: Setup, shape: Bucket) -> float:
    """Numbers of one row that are summed over `tensor`: a layer's two projections back to its width, forward and backward,
    and one of them again where layers are computed again.
    """
    c = setup.model.config
    sums = 5 if setup.config.compute.remat == "full" else 4
    positions = shape.length * c.decoder.num_layers
    positions += shape.images * (c.prefix_length + shape.fused) * c.prefusion_layers
    patches = shape.images * c.tiles * (c.vision.grid**2 + 1) * (c.vision.num_layers - 1)
    return sums * positions * c.decoder.hidden_size + 2 * patches * c.vision.hidden_size


def _on_tensor(leaf: jax.ShapeDtypeStruct) -> float:
    """Numbers of a parameter that a device computes with."""
    return leaf.size / leaf.sharding.mesh.shape["tensor"] if "tensor" in _axes(leaf) else leaf.size


def _axes(leaf: jax.ShapeDtypeStruct) -> set[str]:
    return {str(axis) for entry in leaf.sharding.spec if entry for axis in np.atleast_1d(entry)}

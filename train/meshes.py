"""Which meshes a run could have on so many chips, what its backward pass could keep, in how many parts its rows could be
computed, and what each would cost: estimated, nothing is compiled.

    parameters   each of two passes over the layers brings a device those of the others of its fsdp axis
    gradients    go back to their owners over fsdp, and are summed over data
    activations  are summed over tensor, twice in a layer and pass

`compile` checks the estimates against the compiled program.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

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
from train.ready import computed
from train.roofline import Bound, Held, Work
from train.setup import Setup, plan
from train.step import TrainState

TENSOR = (1, 2, 4, 8)  # sizes of the tensor axis that are tried
SEARCHED = {"remat": ("full", "attention", "narrow", "dots"), "accumulation": (1, 2, 4, 8)}
ROOM = 0.9  # of a chip's memory that an estimate may fill


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh, and how the step is computed on it.

    Attributes:
      mesh, remat: as `compute` takes them.
      accumulation: as `optimizer` takes it.
      held: bytes of one device between steps.
      kept: bytes of one device that wait for the backward pass.
      working: bytes of one device for gradients, in float32, and logits.
      bound: least time of a step.
      exchanged: what is received.
      fits: whether all of it takes at most `ROOM` of the memory.
    """

    mesh: str
    remat: str
    accumulation: int
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


def searched(config: TrainConfig) -> dict[str, tuple]:
    """What is tried beside the mesh: the usual, and what the run has."""
    own = {"remat": config.compute.remat, "accumulation": config.optimizer.accumulation}
    return {name: tuple(dict.fromkeys((*usual, own[name]))) for name, usual in SEARCHED.items()}


def abstract_mesh(spec: str, chip: Chip) -> AbstractMesh:
    """A mesh of chips that need not be here; good for all but compiling. Raises as `sharding.make_mesh`."""
    sizes = sharding.mesh_sizes(spec)
    platform = "tpu" if chip.shapes else "gpu"
    device = AbstractDevice(device_kind=chip.kind, num_cores=1, platform=platform)
    axes = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axes, abstract_device=device)


def specs(config: TrainConfig, devices: int, parts: int) -> Iterator[str]:
    """Meshes of all devices on which the rows of each part come out even; the plainest first."""
    rows = config.data.batch_size // parts
    for tensor in TENSOR:
        shared = devices // tensor
        if devices % tensor or rows % shared:
            continue
        for data in (n for n in range(1, shared + 1) if shared % n == 0):
            yield f"data={data},fsdp={shared // data},tensor={tensor}"


def candidates(
    config: TrainConfig,
    sizes: ModelConfig,
    chip: Chip,
    devices: int,
    shape: Bucket,
    works: Mapping[str, Work],
    parts: Sequence[int] = (),
) -> list[Candidate]:
    """All that could be, the fastest that fits first; those that do not fit last.

    Args:
      config: of the run; where it names a mesh, that one alone.
      sizes: of its model.
      chip, devices: and how many of them.
      shape: of a batch.
      works: by what the backward pass keeps.
      parts: accumulations; none is that of `config` alone.

    Raises:
      UserError: see `plan`; the mesh is none of so many devices; no mesh shares the rows evenly.
    """
    named, parts = config.compute.mesh, parts or (config.optimizer.accumulation,)
    if named and math.prod(sharding.mesh_sizes(named).values()) != devices:
        raise UserError(f"mesh {named!r} is not one of {devices} devices: choose sizes with that product, or none")
    found: list[Candidate] = []
    for spec in [named] if named else list(specs(config, devices, min(parts))):
        setup = plan(computed(config, accumulation=min(parts)), sizes, abstract_mesh(spec, chip))
        state = roofline.planned_state(setup)
        held = roofline.held(state, roofline.abstract_batch(setup, shape))
        for (remat, work), n in itertools.product(works.items(), parts):
            if config.data.batch_size % (n * sharding.batch_multiple(setup.mesh)) == 0:
                setup = dataclasses.replace(setup, config=computed(config, remat=remat, accumulation=n))
                found.append(candidate(spec, setup, state, held, shape, chip, work.in_parts(n)))
    if not found:
        raise UserError(
            f"no mesh of {devices} devices shares {config.data.batch_size} rows in {min(parts)} parts "
            "evenly: change data.batch_size or optimizer.accumulation"
        )
    return sorted(found, key=lambda c: (not c.fits, c.bound.likely, c.bytes))


def candidate(spec: str, setup: Setup, state: TrainState, held: Held, shape: Bucket, chip: Chip, work: Work) -> Candidate:
    """The estimate for one mesh, and the remat and accumulation of the setup's configuration."""
    mesh, c = setup.mesh, setup.config
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
    how = spec, c.compute.remat, c.optimizer.accumulation
    return Candidate(*how, held, kept, working, bound, found, fits)


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
    sums = 5 if setup.config.compute.remat in ("full", "attention") else 4
    positions = shape.length * c.decoder.num_layers
    positions += shape.images * (c.prefix_length + shape.fused) * c.prefusion_layers
    patches = shape.images * c.tiles * (c.vision.grid**2 + 1) * (c.vision.num_layers - 1)
    return sums * positions * c.decoder.hidden_size + 2 * patches * c.vision.hidden_size


def _on_tensor(leaf: jax.ShapeDtypeStruct) -> float:
    """Numbers of a parameter that a device computes with."""
    return leaf.size / leaf.sharding.mesh.shape["tensor"] if "tensor" in _axes(leaf) else leaf.size


def _axes(leaf: jax.ShapeDtypeStruct) -> set[str]:
    return {str(axis) for entry in leaf.sharding.spec if entry for axis in np.atleast_1d(entry)}

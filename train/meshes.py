"""Which meshes a run could have on so many chips, and what each would cost: estimated, nothing is compiled.

    parameters   each of two passes over the layers brings a device those of the others of its fsdp axis
    gradients    go back to their owners over fsdp, and are summed over data
    activations  are summed over tensor, twice in a layer and pass

`compile` checks the estimates against the compiled program.
"""

from __future__ import annotations

import dataclasses
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

TENSOR = (1, 2, 4, 8)  # sizes of the tensor axis that are tried
ROOM = 0.9  # of a chip's memory that an estimate may fill


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh.

    Attributes:
      mesh: as `compute.mesh` takes it.
      held: bytes of one device between steps.
      kept: bytes of one device that wait for the backward pass.
      bound: least time of a step.
      exchanged: what is received.
      fits: whether all that is held and kept takes at most `ROOM` of the memory.
    """

    mesh: str
    held: Held
    kept: float
    bound: Bound
    exchanged: list[Collective]
    fits: bool


def abstract_mesh(spec: str, chip: Chip) -> AbstractMesh:
    """A mesh of chips that need not be here; good for all but compiling."""
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | sharding.parse_mesh(spec)
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
        for data in (1, 2, 4, 8, 16, 32, 64):
            if shared % data == 0 and (data == 1 or shared // data > 1):
                yield f"data={data},fsdp={shared // data},tensor={tensor}"


def candidates(
    config: TrainConfig, sizes: ModelConfig, chip: Chip, devices: int, shape: Bucket, work: Work
) -> list[Candidate]:
    """All meshes, or the one that `config` names, the fastest that fits first; those that do not fit last.

    Raises:
      UserError: see `plan`; no mesh shares the rows evenly.
    """
    wanted = [config.compute.mesh] if config.compute.mesh else list(specs(config, devices))
    if not wanted:
        raise UserError(
            f"no mesh of {devices} devices shares {config.data.batch_size} rows in {config.optimizer.accumulation} parts "
            "evenly: change data.batch_size or optimizer.accumulation"
        )
    found = [candidate(spec, plan(config, sizes, abstract_mesh(spec, chip)), shape, chip, work) for spec in wanted]
    return sorted(found, key=lambda c: (not c.fits, c.bound.step, c.held.total))


def candidate(spec: str, setup: Setup, shape: Bucket, chip: Chip, work: Work) -> Candidate:
    """The estimate for one mesh."""
    held, mesh = roofline.held(setup, shape), setup.mesh
    kept = work.kept_bytes / sharding.batch_multiple(mesh)
    exchanged = exchanges(setup, shape)
    strides = {"data": mesh.shape["fsdp"] * mesh.shape["tensor"], "fsdp": mesh.shape["tensor"], "tensor": 1}
    seconds = sum(roofline.receiving(chip, of, strides[axis]) for axis, of in exchanged.items())
    bound = roofline.bound(chip, mesh.size, work, held, seconds)
    found = [c for of in exchanged.values() for c in of]
    return Candidate(spec, held, kept, bound, found, held.total + kept <= ROOM * chip.memory)


def exchanges(setup: Setup, shape: Bucket) -> dict[str, list[Collective]]:
    """What every device receives in a step, by axis of the mesh."""
    mesh, state = setup.mesh, roofline.planned_state(setup)
    data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.MESH_AXES)
    parts, width = setup.config.optimizer.accumulation, setup.model.dtype.itemsize
    again = setup.config.compute.remat != "none"
    found: dict[str, list[Collective]] = {axis: [] for axis in sharding.MESH_AXES}
    trained = sum(map(_on_tensor, state.trained.values())) * width
    if fsdp > 1:
        whole = sum(
            _on_tensor(leaf) * width * (1 if path.startswith("vision_tower") else 2)  # what is computed again shares a pass
            for path, leaf in {**state.trained, **state.frozen}.items()
            if "fsdp" in _axes(leaf)
        )
        others = parts * (1 - 1 / fsdp)
        found["fsdp"] += [Collective("all-gather", fsdp, others * whole, 0)]
        found["fsdp"] += [Collective("reduce-scatter", fsdp, others * trained, 0)]
    if data > 1:
        found["data"] += [Collective("all-reduce", data, parts * 2 * trained / fsdp * (1 - 1 / data), 0)]
    if tensor > 1:
        summed = 2 * _summed(setup, shape, 3 if again else 2) * setup.config.data.batch_size / (data * fsdp) * width
        found["tensor"] += [Collective("all-reduce", tensor, 2 * summed * (1 - 1 / tensor), 0)]
    return found


def _summed(setup: Setup, shape: Bucket, passes: int) -> float:
    """Numbers of one row that a layer's two projections back to its width give, in all layers and passes."""
    c = setup.model.config
    positions = shape.length * c.decoder.num_layers
    positions += shape.images * (c.prefix_length + shape.fused) * c.prefusion_layers
    patches = shape.images * c.tiles * (c.vision.grid**2 + 1) * (c.vision.num_layers - 1)
    return passes * positions * c.decoder.hidden_size + patches * c.vision.hidden_size


def _on_tensor(leaf: jax.ShapeDtypeStruct) -> float:
    """Numbers of a parameter that a device computes with."""
    return leaf.size / leaf.sharding.mesh.shape["tensor"] if "tensor" in _axes(leaf) else leaf.size


def _axes(leaf: jax.ShapeDtypeStruct) -> set[str]:
    return {str(axis) for entry in leaf.sharding.spec if entry for axis in np.atleast_1d(entry)}

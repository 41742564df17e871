"""Chips that runs are planned for: what they can do, and how many of them are joined how.

Figures are the makers' (docs.cloud.google.com/tpu/docs: v4, v5e, v5p, v6e; NVIDIA's data sheets of A100 80GB SXM and H100 SXM,
with eight GPUs to a node and one 200 and 400 Gbit/s adapter for each, as in their own systems).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp

from lmm_jax.errors import UserError
from train.flops import peak_flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    Attributes:
      name: as in topologies, "v5e".
      kind: `jax.Device.device_kind`.
      memory: bytes that a program may take.
      bandwidth: of memory, bytes/s.
      links: bytes/s that it can receive from the others of its island, over all links together (TPUs: in a whole torus).
      island: most devices that are joined by such links.
      network: bytes/s that it can receive from other islands, its share of the host's adapters.
      shapes: topologies by their number of devices, as libtpu names them; none for a GPU.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    links: float
    island: int
    network: float
    shapes: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Dense FLOP/s in bfloat16."""
        peak = peak_flops(self.kind, jnp.bfloat16)
        assert peak
        return peak


_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_CUBES[1024] = "8x8x16"
_RING = {2: 16, 3: 4}  # axes of a torus are rings where they are multiples of this, else lines

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 30.75 * 2**30, 1228e9, 300e9, 4096, 3.1e9, _CUBES),
        Chip("v5e", "TPU v5 lite", 15.75 * 2**30, 819e9, 200e9, 256, 3.1e9, _FLAT),
        Chip("v5p", "TPU v5", 95.74 * 2**30, 2765e9, 600e9, 6144, 6.25e9, _CUBES),
        Chip("v6e", "TPU v6 lite", 31.25 * 2**30, 1600e9, 400e9, 256, 12.5e9, _FLAT),
        Chip("a100", "NVIDIA A100-SXM4-80GB", 80e9, 2039e9, 300e9, 8, 25e9),
        Chip("h100", "NVIDIA H100 80GB HBM3", 80e9, 3350e9, 450e9, 8, 50e9),
    )
}
QUICK = {"xla_optimization_level": "EFFORT_O0"}  # libtpu then spends little on the code of each operation
_CORES = ("v4", "v5p")  # whose names count cores, two to a chip, and not chips


def parse(topology: str) -> tuple[Chip, int, str]:
    """Chip, number of devices, and libtpu's name ("" for GPUs) of a topology.

    A chip at the edge of a slice that is no torus has fewer links than others, and the slowest chip sets the pace: the chip
    that is returned has as many as that one.

    Args:
      topology: as clouds name them, v5e-64, v5p-128 (64 chips, whose cores are counted), h100-8; or with a shape, v5e:8x8.

    Raises:
      UserError: there is none of that name.
    """
    match = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", topology)
    chip = CHIPS.get(match[1]) if match else None
    if match and chip and match[3] and chip.shapes:
        sides = [int(side) for side in match[3].split("x")]
        if all(sides) and len(sides) == len(_sides(chip)):
            return with_links(chip, match[3]), math.prod(sides), f"{chip.name}:{match[3]}"
    count = int(match[2]) if match and match[2] and chip else 0
    if chip and chip.name in _CORES:
        count = count // 2 if count % 2 == 0 else 0
    if chip and chip.shapes and count in chip.shapes:
        return with_links(chip, chip.shapes[count]), count, f"{chip.name}:{chip.shapes[count]}"
    if chip and not chip.shapes and count and (count < chip.island or count % chip.island == 0):
        return chip, count, ""
    raise UserError(f"there is no topology {topology!r}: choose one of {_known()}, or name its shape as v5e:8x8")


def with_links(chip: Chip, shape: str) -> Chip:
    """The chip with the links that one at the edge of a slice has."""
    sides = [int(side) for side in shape.split("x")]
    ring = _RING[len(sides)]
    links = sum(2 if side % ring == 0 else 1 if side > 1 else 0 for side in sides)
    return dataclasses.replace(chip, links=chip.links * links / (2 * len(sides)))


def _sides(chip: Chip) -> list[str]:
    return next(iter(chip.shapes.values())).split("x")


def _known() -> str:
    names = []
    for chip in CHIPS.values():
        factor = 2 if chip.name in _CORES else 1
        counts = [n * factor for n in chip.shapes] or [8, 16, 32, 64]
        names.append(f"{chip.name}-{{{','.join(map(str, counts))}}}")
    return ", ".join(names)


def quiet_libtpu() -> None:
    """Lets libtpu compile where there is no TPU, without asking the network for one; before JAX is first used."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    wanted = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
    wanted |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def described(shape: str) -> list[jax.Device]:
    """The devices of a TPU topology, none of which is here.

    Raises:
      UserError: libtpu is not installed, or knows no such shape.
    """
    from jax.experimental import topologies

    try:
        found: Any = topologies.get_topology_desc(platform="tpu", topology_name=shape)
    except Exception as error:  # a RuntimeError of its own for each cause
        reason = "pip install 'lmm-jax[tpu-aot]'" if "libtpu" in str(error) else "choose another one"
        told = str(error).splitlines()[0]
        raise UserError(f"the topology {shape} cannot be compiled for here ({told}): {reason}") from error
    return list(found.devices)

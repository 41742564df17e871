"""Flags that the training step is compiled with, by platform: exchanges that go on while the devices compute.

libtpu and XLA hide most exchanges by themselves; these flags are what it takes beside that. On v5e they let sums over devices
run beside products, as gathers do by default; libtpu refuses that for other TPUs. On GPU they turn on the scheduler that hides
latency, and let the exchanges of one layer of a loop overlap with the layer before (docs.jax.dev, GPU performance tips). They
hold for the step alone; those in the environment (XLA_FLAGS, LIBTPU_INIT_ARGS) hold for every program.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmm_jax import sharding
from lmm_jax.errors import UserError

FLAGS: dict[str, dict[str, str]] = {  # by platform, or by kind of device
    "TPU v5 lite": {
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    },
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        "xla_gpu_enable_pipelined_all_gather": "true",
        "xla_gpu_enable_pipelined_all_reduce": "true",
        "xla_gpu_enable_pipelined_reduce_scatter": "true",
    },
}

logger = logging.getLogger(__name__)


def options(mesh: Mesh, more: Sequence[str] = ()) -> dict[str, Any]:
    """Compiler options for the devices of a mesh.

    Args:
      mesh: its devices need not be here.
      more: ``name=value`` each, put in place of a platform's own; ``name=`` leaves one out.

    Raises:
      UserError: one is not of that form.
    """
    flags = FLAGS.get(sharding.platform(mesh), {}) | FLAGS.get(sharding.device_kind(mesh), {})
    for flag in more:
        name, equals, value = flag.removeprefix("--").partition("=")
        if not equals or not name.startswith("xla_"):
            raise UserError(f"compute.xla_flags has {flag!r}: give flags as xla_name=value, or xla_name= to leave one out")
        flags[name] = value
    truth = {"true": True, "false": False}
    return {name: truth.get(value.lower(), value) for name, value in flags.items() if value}


def known(flags: dict[str, Any], own: Sequence[str], mesh: Mesh) -> dict[str, Any]:
    """The options that the compiler knows; a platform's flag that it does not know is left out, and logged.

    Args:
      flags: from `options`.
      own: as its argument `more`; none of these is left out.
      mesh: of devices that are here or of a topology.

    Raises:
      UserError: the compiler refuses one of `own`.
    """
    kept, number = {}, jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
    for name, value in flags.items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(number).compile()
        except jax.errors.JaxRuntimeError as error:
            if any(flag.removeprefix("--").startswith(f"{name}=") for flag in own):
                raise UserError(f"the compiler refuses {name}={value} of compute.xla_flags: {_first(error)}") from error
            logger.warning("the compiler does not take %s=%s: left out", name, value)
        else:
            kept[name] = value
    return kept


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]

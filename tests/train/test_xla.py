"""Flags of the compiler: those of the devices, one's own, and those that the compiler here does not know."""

import logging

import pytest

from lmm_jax import sharding
from lmm_jax.errors import UserError
from train import xla
from train.hardware import CHIPS
from train.meshes import abstract_mesh

UNKNOWN = "xla_of_another_version"


def mesh(chip):
    return abstract_mesh("fsdp=8", CHIPS[chip])


def test_flags_are_those_of_the_devices():
    v5e, v5p, h100 = (xla.options(mesh(chip)) for chip in ("v5e", "v5p", "h100"))
    assert v5e["xla_enable_async_all_reduce"] is True and not v5p
    assert h100["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert xla.options(sharding.make_mesh("fsdp=8")) == {}


def test_own_flags_come_last():
    own = ("xla_enable_async_all_reduce=false", "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=", "xla_number=7")
    assert xla.options(mesh("v5e"), own) == {"xla_enable_async_all_reduce": False, "xla_number": "7"}


@pytest.mark.parametrize("flag", ["xla_dump_to", "dump=1", "=1", ""])
def test_what_is_no_flag(flag):
    with pytest.raises(UserError, match="give flags as xla_name=value"):
        xla.options(mesh("v5e"), (flag,))


def test_a_flag_that_is_not_known_here(caplog):
    here = sharding.make_mesh("fsdp=8")
    given = {"xla_cpu_enable_fast_math": False, UNKNOWN: True}
    with caplog.at_level(logging.WARNING):
        assert xla.known(given, (), here) == {"xla_cpu_enable_fast_math": False}
    assert f"does not take {UNKNOWN}=True: left out" in caplog.text
    with pytest.raises(UserError, match=f"the compiler refuses {UNKNOWN}=True of compute.xla_flags: .*No such"):
        xla.known(given, (f"{UNKNOWN}=true",), here)
    with pytest.raises(UserError, match="the compiler refuses xla_cpu_enable_fast_math=often"):
        xla.known({"xla_cpu_enable_fast_math": "often"}, ("--xla_cpu_enable_fast_math=often",), here)

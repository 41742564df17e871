"""What the compiled step of stage 1 holds at full size, read off the program; nothing of it is allocated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage1_llama_3_1_8b
from lmm_jax import sharding
from lmm_jax.config import named_sizes
from lmm_jax.models.llava_mini import LlavaMini, abstract_params
from train.config import GroupConfig
from train.optimizer import assign_groups
from train.setup import Setup, abstract_state

ROWS, LENGTH, LABELS = 8, 640, 32
SIZES = dataclasses.replace(named_sizes()["llava-mini-llama-3.1-8b"], compressor=None, prefusion_layers=0)


def setup_of(groups):
    """The shipped configuration on 8 devices."""
    config = stage1_llama_3_1_8b.get_config()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, groups=groups))
    mesh = sharding.make_mesh("fsdp=8")
    model = LlavaMini(SIZES, jnp.dtype(config.compute.dtype), remat=config.compute.remat)
    assigned = assign_groups(sharding.leaf_paths(abstract_params(SIZES, mesh)), groups)
    return Setup(config, mesh, model, assigned, rows=np.arange(ROWS))


def batch_of(setup):
    shapes = {name: (ROWS, LENGTH) for name in ("ids", "fused_index", "vision_index")}
    shapes |= {"fused_ids": (ROWS, 1), "queries": (ROWS, LABELS), "targets": (ROWS, LABELS)}
    shapes |= {name: (ROWS,) for name in ("lengths", "used", "skipped")}
    batch = {name: jax.ShapeDtypeStruct(s, jnp.int32, sharding=setup.batch_sharding(s)) for name, s in shapes.items()}
    pixels = (ROWS, 1, 1, 336, 336, 3)
    return batch | {"pixels": jax.ShapeDtypeStruct(pixels, jnp.uint8, sharding=setup.batch_sharding(pixels))}


def device_bytes(tree):
    """Of one of the devices."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_stage_1_holds_no_state_for_the_frozen():
    """Arguments of the program: frozen weights once in bfloat16, the projector three times in float32, the batch."""
    setup = setup_of(stage1_llama_3_1_8b.get_config().optimizer.groups)
    state, batch = abstract_state(setup, 100), batch_of(setup)
    with jax.set_mesh(setup.mesh):
        memory = setup.step_function(100).lower(state, batch).compile().memory_analysis()

    params = sharding.leaf_paths(abstract_params(SIZES, setup.mesh))
    projector = {path: leaf for path, leaf in params.items() if path.startswith("mm_projector/")}
    frozen = sum(math.prod(x.sharding.shard_shape(x.shape)) for path, x in params.items() if path not in projector)
    assert sum(x.size for x in params.values()) > 8.3e9
    expected = 2 * frozen + 3 * device_bytes(projector) + device_bytes(batch)
    unused = device_bytes([batch["fused_index"], batch["fused_ids"]])  # without pre-fusion
    assert memory.argument_size_in_bytes == pytest.approx(expected - unused, abs=64)  # and three counters
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert kept < 1024  # the new state takes the place of the old one; what comes beside it are figures


def test_moments_would_show():
    """Held for the decoder as well, masters and moments in float32 would take six times the weights in bfloat16."""
    groups = (GroupConfig("mm_projector/.*|(layers|embed_tokens|norm|lm_head)/.*", 1e-3), GroupConfig("vision_tower/.*"))
    stage_1 = stage1_llama_3_1_8b.get_config().optimizer.groups
    held, without = (device_bytes(abstract_state(setup_of(g), 100)) for g in (groups, stage_1))
    assert held > 5 * without

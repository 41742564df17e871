"""Estimates of what a run takes, against the programs that XLA makes of small ones, and against sums by hand."""

import dataclasses
import math

import jax
import pytest

from lmm_jax import sharding
from lmm_jax.analysis import program
from lmm_jax.config import REMAT, named_sizes
from lmm_jax.errors import UserError
from train import meshes, roofline
from train.config import ComputeConfig, DataConfig, GroupConfig, OptimizerConfig, StartConfig, TrainConfig
from train.hardware import CHIPS
from train.setup import plan

TINY = named_sizes()["tiny"]
V5E, H100 = CHIPS["v5e"], CHIPS["h100"]
WORKS = {"full": roofline.Work(1, 1, 1, 1, 1)}
FROZEN = (GroupConfig("vision_tower/.*|compressor/pos_embed"), GroupConfig("(?!vision_tower/|compressor/pos_embed).*", 1e-3))


def run(groups=FROZEN, batch=16, **compute) -> TrainConfig:
    data = DataConfig(batch_size=batch, max_length=64, buckets=())
    compute = ComputeConfig(dtype="bfloat16", **compute)
    return TrainConfig("run", StartConfig(scratch=TINY), data, OptimizerConfig(groups), compute=compute)


def planned(spec, config=None, chip=V5E):
    setup = plan(config or run(), TINY, meshes.abstract_mesh(spec, chip))
    return setup, roofline.bucket(setup, 1, 64)


def held_of(setup, shape):
    return roofline.held(roofline.planned_state(setup), roofline.abstract_batch(setup, shape))


def test_a_mesh_of_chips_that_are_not_here():
    setup, _ = planned("fsdp=4,tensor=2")
    assert sharding.platform(setup.mesh) == "tpu" and setup.model.dtype == "bfloat16"
    assert sharding.platform(planned("fsdp=4", chip=H100)[0].mesh) == "gpu"


@pytest.mark.slow
def test_what_is_held_is_what_the_arrays_take():
    """The same run on devices that are here: argument bytes of the compiled step."""
    setup, shape = planned("fsdp=4,tensor=2")
    here = plan(run(), TINY, sharding.make_mesh("fsdp=4,tensor=2"))
    with jax.set_mesh(here.mesh):
        state, batch = roofline.planned_state(here), roofline.abstract_batch(here, shape)
        compiled = here.step_function(roofline.STEPS).lower(state, batch).compile()
    step = 4  # bytes of its number
    assert compiled.memory_analysis().argument_size_in_bytes == held_of(setup, shape).total + step


def test_frozen_parameters_have_no_optimizer_state():
    stage_1 = (GroupConfig("mm_projector/.*", 1e-3), GroupConfig("(?!mm_projector/).*"))
    held = held_of(*planned("fsdp=8", run(stage_1)))
    assert held.frozen > 20 * held.trained
    assert 2 * held.trained <= held.optimizer <= 2 * held.trained + 64  # two moments and counters


@pytest.mark.slow
def test_exchanges_are_those_of_the_compiled_program():
    """CPU programs gather in float32, and sum whole gradients where they could scatter them."""
    config = run(remat="none")
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="float32"))
    setup, shape = planned("fsdp=8", config)
    found = [c for of in meshes.exchanges(setup, roofline.planned_state(setup), shape).values() for c in of]
    here = plan(config, TINY, sharding.make_mesh("fsdp=8"))
    with jax.set_mesh(here.mesh):
        state, batch = roofline.planned_state(here), roofline.abstract_batch(here, shape)
        text = here.step_function(roofline.STEPS).lower(state, batch).compile().as_text()
    got = program.collectives(text)
    gathered = sum(c.received for c in got if c.kind == "all-gather")
    assert gathered == pytest.approx(sum(c.received for c in found if c.kind == "all-gather"), rel=0.25)
    summed = sum(c.received for c in got if c.kind in ("all-reduce", "reduce-scatter"))
    assert sum(c.received for c in found if c.kind != "all-gather") <= summed


def test_work_does_not_depend_on_the_mesh():
    one, eight = (roofline.work(*planned(spec)) for spec in ("data=1", "fsdp=4,tensor=2"))
    assert one == eight
    assert one.model_flops < one.executed_flops < 2 * one.model_flops  # remat full


@pytest.mark.slow
def test_remat_trades_memory_for_products():
    works = [roofline.work(*planned("data=1", run(remat=remat))) for remat in REMAT]
    none, full, *_ = works
    assert none.kept_bytes > 3 * full.kept_bytes
    more = [*works[1:], none]
    assert [w.kept_bytes for w in more] == sorted(w.kept_bytes for w in more)
    assert [w.executed_flops for w in more] == sorted((w.executed_flops for w in more), reverse=True)
    assert none.executed_flops < full.executed_flops
    inputs = 16 * 64 * TINY.decoder.hidden_size * 2  # of each layer, in two bytes
    assert full.kept_bytes >= TINY.decoder.num_layers * inputs


def test_accumulation_keeps_a_part_only():
    once = run()
    four = dataclasses.replace(once, optimizer=dataclasses.replace(once.optimizer, accumulation=4))
    kept = [roofline.work(*planned("data=1", config)).kept_bytes for config in (once, four)]
    assert kept[0] == pytest.approx(4 * kept[1], rel=0.01)


def test_parts_and_remat_are_searched():
    config = run(batch=64)
    _, shape = planned("data=1", config)
    works = {remat: roofline.work(*planned("data=1", run(batch=64, remat=remat))) for remat in ("full", "dots")}
    found = meshes.candidates(config, TINY, V5E, 8, shape, works, (1, 2, 16))
    of = {(c.mesh, c.remat, c.accumulation): c for c in found}
    assert len(of) == len(found)
    mesh = "data=1,fsdp=8,tensor=1"
    assert (mesh, "full", 16) not in of  # 4 rows for 8 devices
    once, twice, more = of[mesh, "full", 1], of[mesh, "full", 2], of[mesh, "dots", 1]
    assert twice.kept == once.kept / 2 and twice.bound.exchange == 2 * once.bound.exchange
    assert more.kept > once.kept and more.bound.compute < once.bound.compute
    one = meshes.candidates(config, TINY, V5E, 8, shape, {"dots": works["dots"]}, (2,))
    assert dataclasses.asdict(one[0]) == dataclasses.asdict(of[one[0].mesh, "dots", 2])


def test_candidates_share_rows_evenly():
    config = run(batch=16)
    found = list(meshes.specs(config, 32, 1))
    assert "data=1,fsdp=16,tensor=2" in found and not any(spec.endswith("tensor=1") for spec in found)
    for spec in found:
        assert math.prod(sharding.mesh_sizes(spec).values()) == 32
    assert not list(meshes.specs(run(batch=12), 64, 1))
    assert set(meshes.specs(config, 32, 2)) < set(found)


def test_no_mesh_is_told():
    config = run(batch=12)
    _, shape = planned("data=1", config)
    with pytest.raises(UserError, match="no mesh of 64 devices shares 12 rows in 1 parts evenly"):
        meshes.candidates(config, TINY, V5E, 64, shape, WORKS)


def test_the_fastest_that_fits_comes_first():
    config = run(batch=64)
    setup, shape = planned("data=1", config)
    work = roofline.work(setup, shape)
    held = held_of(setup, shape)
    small = dataclasses.replace(V5E, memory=0.6 * held.total)
    found = meshes.candidates(config, TINY, small, 8, shape, {"full": work})
    fits = [c.fits for c in found]
    assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]
    first = [c.bound.likely for c in found if c.fits]
    assert first == sorted(first)
    named = dataclasses.replace(config, compute=dataclasses.replace(config.compute, mesh="data=2,fsdp=4"))
    assert [c.mesh for c in meshes.candidates(named, TINY, V5E, 8, shape, {"full": work})] == ["data=2,fsdp=4"]


def test_exchanges_between_islands_wait_for_the_network():
    gather = [program.Collective("all-gather", 16, 15e9, 1)]
    inside = [program.Collective("all-gather", 8, 7e9, 1)]
    assert roofline.receiving(H100, inside) == pytest.approx(7e9 / 450e9)
    # 16 GB in all, 8 of them from the other island, which eight adapters share
    slow = dataclasses.replace(H100, network=10e9)
    assert roofline.receiving(slow, gather) == pytest.approx(8e9 / 8 / 10e9)
    assert roofline.receiving(H100, gather) == pytest.approx(15e9 / 450e9)  # the links take longer
    # neighbours eight devices apart have no link at all
    assert roofline.receiving(H100, inside, stride=8) == pytest.approx(7e9 / 50e9)


def test_bounds():
    held = roofline.Held(10, 20, 30, 40)
    bound = roofline.bound(V5E, 2, roofline.Work(197e12, 394e12, 8.0, 0.0, 3), held, 5.0, 0.5)
    assert (bound.compute, bound.exchange, bound.step) == (1.0, 0.5, 1.0)
    assert bound.memory == pytest.approx((2 * 40 + 20 + 40 + 2 * 5 + 2 * 3 * 4) / 819e9)
    assert bound.mfu == pytest.approx(0.5)
    assert bound.likely == 1.25  # halfway between 1.0 and 1.5


def test_a_named_mesh_is_checked():
    for mesh, message in (("fsdp=4", "is not one of 8 devices"), ("fsdp=0", "positive sizes"), ("model=8", "positive sizes")):
        config = run(mesh=mesh)
        with pytest.raises(UserError, match=message):
            meshes.candidates(config, TINY, V5E, 8, planned("data=1")[1], WORKS)


def test_rows_that_cannot_be():
    setup, _ = planned("data=1")
    for images, length in ((1, 65), (64, 64), (63, 64)):
        with pytest.raises(UserError, match="choose other --images or --length"):
            roofline.bucket(setup, images, length)


def test_exchanges_by_hand():
    """Over tensor: two projections of each layer, both ways; over data: gradients; in two bytes."""
    config = run(remat="none", groups=(GroupConfig("(?!lm_head).*"), GroupConfig("lm_head/.*", 1e-3)))
    setup, shape = planned("data=2,tensor=4", config)
    found = meshes.exchanges(setup, roofline.planned_state(setup), shape)
    d, v = TINY.decoder, TINY.vision
    positions = 64 * d.num_layers + (TINY.prefix_length + shape.fused) * TINY.prefusion_layers
    summed = 4 * positions * d.hidden_size + 2 * (v.grid**2 + 1) * (v.num_layers - 1) * v.hidden_size
    assert found["fsdp"] == []
    assert found["tensor"] == [program.Collective("all-reduce", 4, 2 * 2 * summed * 8 * 3 / 4, 0)]
    head = d.hidden_size * d.vocab_size / 4
    assert found["data"] == [program.Collective("all-reduce", 2, 2 * 2 * head / 2, 0)]

"""The mesh, the two tables, and that a model is the same on any mesh."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import INFERENCE, MESHES, golden, relative_error, slow

import lmm_jax
from lmm_jax import sharding
from lmm_jax.config import named_sizes
from lmm_jax.errors import UserError
from lmm_jax.models.llava_mini import abstract_params, init_params


@pytest.mark.parametrize("size", named_sizes())
def test_every_parameter_has_one_rule(size):
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    abstract = abstract_params(named_sizes()[size], mesh, jnp.bfloat16)
    for path, leaf in sharding.leaf_paths(abstract).items():
        axes = sharding.logical_axes(path, len(leaf.shape))
        assert set(axes) <= set(sharding.MESH_RULES)
        big = leaf.size * leaf.dtype.itemsize > 2**20
        assert not big or not leaf.sharding.is_fully_replicated, f"{path} {leaf.shape} is on every device"


def test_rules_that_match_nothing_or_twice_are_all_named(monkeypatch):
    mesh = sharding.make_mesh()
    tree = {"a": jnp.zeros(2), "norm": {"scale": jnp.zeros(2)}, "b": jnp.zeros(2)}
    monkeypatch.setattr(sharding, "PARAMETER_AXES", (*sharding.PARAMETER_AXES, (r"norm/.*", ("small",))))
    with pytest.raises(ValueError) as error:
        sharding.param_shardings(tree, mesh)
    assert "0 rules" in str(error.value) and "2 rules" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("spec", ["data=3,fsdp=3", "tensor=9", "rows=2", "data=0", "data=2,data=2", "data", "data=-1", ""])
def test_bad_mesh(spec):
    with pytest.raises(UserError):
        sharding.make_mesh(spec)


def test_smaller_mesh_is_noticed(caplog):
    with caplog.at_level(logging.WARNING):
        assert sharding.make_mesh("fsdp=2").size == 2
    assert "2 of 8 devices" in caplog.text


def test_axis_that_does_not_divide_is_replicated_with_one_notice(caplog):
    config = named_sizes()["tiny"]
    decoder = dataclasses.replace(config.decoder, num_kv_heads=2)
    with caplog.at_level(logging.WARNING):
        tree = abstract_params(dataclasses.replace(config, decoder=decoder), sharding.make_mesh("tensor=8"))
    assert len(caplog.records) == 1
    assert "kv_heads (size 2, 8 devices)" in caplog.text
    assert tree["layers"]["last"]["self_attn"]["k_proj"]["kernel"].sharding.is_fully_replicated
    assert not tree["layers"]["last"]["self_attn"]["q_proj"]["kernel"].sharding.is_fully_replicated


@pytest.mark.parametrize("spec", ["fsdp=8", "tensor=8"])
def test_no_device_holds_more_than_a_seventh(tiny, spec):
    params = lmm_jax.load(tiny("tiny"), mesh=spec).engine.params
    assert max_share(params) <= 1 / 7


@pytest.mark.slow
def test_initialised_parameters_are_sharded_and_the_same_on_any_mesh():
    config = named_sizes()["tiny"]
    one = init_params(config, sharding.make_mesh(), seed=3)
    eight = init_params(config, sharding.make_mesh("fsdp=8"), seed=3)
    assert max_share(eight) <= 1 / 7
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(eight))


def max_share(params):
    """Largest share of all parameter bytes that one device holds."""
    held = dict.fromkeys(jax.devices(), 0)
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize(
    "size,spec",
    [
        ("tiny", MESHES[-1]),
        *slow(*(("tiny", m) for m in MESHES[:-1]), *((s, MESHES[-1]) for s in ("tiny-hd", "tiny-llava-v1.5"))),
    ],
)
def test_same_logits_and_tokens_on_every_mesh(tiny, size, spec):
    config = named_sizes()[size]
    side, rng = config.vision.image_size, np.random.default_rng(0)
    ids = rng.integers(3, config.decoder.vocab_size, (3, 12))
    ids[:, 4] = -200
    pixels = rng.normal(size=(3, config.tiles, 3, side, side)).astype(np.float32)
    expected, got = (lmm_jax.load(tiny(size), mesh=m) for m in (None, spec))
    assert relative_error(got.logits(ids, None, pixels), expected.logits(ids, None, pixels)) <= 1e-5
    tokens = [m.generate(ids, None, pixels, max_new_tokens=6) for m in (got, expected)]
    np.testing.assert_array_equal(*tokens)


GOLDEN_ON_MESHES = [
    (case, scenario, spec)
    for case, scenario in INFERENCE
    for spec in MESHES[::-1]
    if scenario == "inference" or spec == MESHES[-1]  # every checkpoint on every mesh, every scenario on the mixed one
]


@pytest.mark.parametrize("case,scenario,spec", [GOLDEN_ON_MESHES[0], *slow(*GOLDEN_ON_MESHES[1:])])
def test_golden_checkpoints_on_every_mesh(assistant, case, scenario, spec):
    expected = golden(case, scenario)
    inputs = expected["input_ids"], expected["attention_mask"], expected.get("pixel_values")
    loaded, real = assistant(case, mesh=spec), expected["inputs_embeds_mask"] > 0
    assert relative_error(loaded.logits(*inputs)[real], expected["logits"][real]) <= 1e-5
    np.testing.assert_array_equal(loaded.generate(*inputs, max_new_tokens=8), expected["greedy_tokens"])

"""LoRA: adapters change nothing at first, learn alone, and merge into the kernels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import split
from flax import traverse_util
from support import relative_error

from lmm_jax import checkpoint, sharding
from lmm_jax.config import named_sizes
from lmm_jax.errors import UserError
from lmm_jax.models.llava_mini import LlavaMini, abstract_params, init_params
from train.config import GroupConfig, LoraConfig, OptimizerConfig, StartConfig, TrainConfig
from train.export import write_model_folder
from train.lora import add_lora, init_lora, merge, take_lora
from train.optimizer import assign_groups
from train.setup import Setup, abstract_state, initial_state
from train.start import abstract_start

CONFIG = named_sizes()["tiny"]
LORA = LoraConfig(rank=4, alpha=8.0, targets=r"(layers|prefusion_layers)/.*_proj")


@pytest.fixture(scope="module")
def params():
    return traverse_util.flatten_dict(init_params(CONFIG, sharding.make_mesh(), seed=2), sep="/")


@functools.cache
def adapters(mesh="fsdp=1"):
    abstract = sharding.leaf_paths(add_lora(abstract_params(CONFIG, sharding.make_mesh(mesh)), LORA))
    return init_lora(abstract, LORA, seed=5), abstract


@jax.jit
def logits(params):
    pixels = jax.random.normal(jax.random.key(0), (1, 1, 56, 56, 3))
    nested = traverse_util.unflatten_dict(params, sep="/")
    return LlavaMini(CONFIG).apply({"params": nested}, pixels, jnp.arange(3, 15)[None])


def filled(leaves):
    """Adapters that change something."""
    rng = np.random.default_rng(0)
    noise = {path: rng.standard_normal(x.shape, np.float32) / 10 for path, x in leaves.items() if path.endswith("lora_b")}
    return leaves | {path: jnp.asarray(x) for path, x in noise.items()}


@pytest.mark.slow
def test_the_model_starts_unchanged_and_merges(params):
    new = adapters()[0]
    before = logits(params)
    np.testing.assert_array_equal(logits(params | new), before)

    changed = params | filled(new)
    base, found = take_lora(changed)
    assert base.keys() == params.keys() and len(found) == 4 * 7
    for path, adapter in found.items():
        base[path] = (jax.vmap(merge) if "/stack/" in path else merge)(base[path], *adapter)
    assert relative_error(logits(base), logits(changed)) <= 1e-5
    assert relative_error(logits(base), before) > 1e-2


def test_merging_one_layer_by_hand(params):
    _, found = take_lora(params | filled(adapters()[0]))
    path = "layers/stack/self_attn/o_proj/kernel"
    a, b, scale = (np.asarray(x[1], np.float64) for x in found[path])
    expected = np.asarray(params[path][1]) + 2.0 * np.einsum("nhr,rd->nhd", a, b)
    assert scale == LORA.alpha / LORA.rank and np.abs(a).max() <= 128**-0.5
    assert relative_error(merge(params[path][1], *(x[1] for x in found[path])), expected) <= 1e-6


@pytest.mark.slow
def test_only_adapters_learn(params):
    groups = (GroupConfig(r".*/lora_[ab]", 1e-3), GroupConfig(r"(?!.*/lora_[ab]$).*"))
    new = adapters()[0]
    trained, frozen, _ = split(traverse_util.unflatten_dict(params | filled(new), sep="/"), groups)
    assert trained.keys() == {path for path in new if not path.endswith("lora_scale")}
    grads = jax.jit(jax.grad(lambda t: jnp.sum(logits(t | frozen) ** 2)))(trained)
    assert all(np.any(g) for g in grads.values())


@pytest.mark.slow
def test_shards_and_dtypes():
    alone, _ = adapters()
    shared, abstract = adapters("data=2,fsdp=2,tensor=2")
    for path, leaf in shared.items():
        assert leaf.sharding == abstract[path].sharding
        np.testing.assert_array_equal(leaf, alone[path])
    for path, parts in {"layers/stack/mlp/down_proj/lora_a": 2, "layers/last/self_attn/q_proj/lora_b": 2}.items():
        assert shared[path].addressable_shards[0].data.size * parts == shared[path].size
    half = sharding.leaf_paths(add_lora(abstract_params(CONFIG, sharding.make_mesh(), jnp.bfloat16), LORA))
    assert {x.dtype for x in init_lora(half, LORA, 0).values()} == {jnp.dtype(jnp.bfloat16)}


def test_full_size():
    """The adapters of Vicuna-7B with the published rank 128: 320M parameters."""
    tree = add_lora(abstract_params(named_sizes()["llava-v1.5-7b"], sharding.make_mesh("fsdp=8")), LoraConfig(rank=128))
    leaves = sharding.leaf_paths(tree)
    added = sum(math.prod(s.shape) for path, s in leaves.items() if path.endswith(("lora_a", "lora_b")))
    assert added == 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) == 319_815_680
    groups = (GroupConfig(r".*/lora_[ab]", 2e-4), GroupConfig(r"(?!.*/lora_[ab]$).*"))
    assert len(assign_groups(leaves, groups)) == len(leaves)


@pytest.mark.parametrize("targets", ("mm_projector/.*", "layers/.*_norm", "vision_tower/layers/self_attn/q_proj", ".*_proj"))
def test_only_the_decoder_can_be_adapted(targets):
    with pytest.raises(UserError, match="layers/"):
        add_lora(abstract_params(CONFIG, sharding.make_mesh()), LoraConfig(rank=4, targets=targets))


def params_of(folder):
    return sharding.leaf_paths(checkpoint.load_params(folder, abstract_params(CONFIG, sharding.make_mesh())))


def test_from_a_folder_to_a_folder(tiny, tmp_path):
    """A run's first state loads the folder and adds adapters; its model folder holds merged kernels and nothing of them."""
    folder, mesh = tiny("tiny"), sharding.make_mesh("fsdp=2")
    groups = (GroupConfig(r".*/lora_[ab]", 1e-3), GroupConfig(r"(?!.*/lora_[ab]$).*"))
    config = TrainConfig("", StartConfig(str(folder)), optimizer=OptimizerConfig(groups), lora=LORA)
    leaves = sharding.leaf_paths(abstract_start(CONFIG, LORA, mesh, lambda _: jnp.float32))
    setup = Setup(config, mesh, LlavaMini(CONFIG), assign_groups(leaves, groups), rows=np.arange(2))
    state = initial_state(setup, abstract_state(setup, 10))
    trained = state.trained | filled(state.trained)
    write_model_folder(tmp_path / "model", CONFIG, config.start, folder, trained, state.frozen, jnp.float32)
    written = params_of(tmp_path / "model")
    assert relative_error(logits(written), logits(trained | state.frozen)) <= 1e-5
    assert relative_error(logits(written), logits(params_of(folder))) > 1e-2
    np.testing.assert_array_equal(written["norm/scale"], state.frozen["norm/scale"])

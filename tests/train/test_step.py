"""One step of training against the published gradients and against itself, cut differently."""

import functools

import jax
import numpy as np
import optax
import pytest
from batches import STAGE_1, STAGE_2, batch_of, golden_batch, split, stepping
from flax import traverse_util
from published import to_hf_names
from support import TRAINING, golden, gradient_norms, relative_error, slow, trained_params

from lmm_jax import sharding
from lmm_jax.config import IGNORE_LABEL, REMAT
from lmm_jax.data.layout import Row
from lmm_jax.errors import UserError
from lmm_jax.models.llava_mini import LlavaMini
from train.config import GroupConfig, OptimizerConfig
from train.optimizer import assign_groups, schedule
from train.step import gradients

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def groups_of(scenario):
    return STAGE_1 if scenario == "training_stage1" else STAGE_2


def published_gradients(expected):
    return {name.removeprefix("grad."): g for name, g in expected.items() if name.startswith("grad.")}


def hf_names(config, flat):
    """On the host, where slicing a leaf compiles nothing."""
    return to_hf_names(config, traverse_util.unflatten_dict(jax.device_get(flat), sep="/"))


@functools.cache
def program(config, chunk, parts, remat):
    return jax.jit(functools.partial(gradients, LlavaMini(config, remat=remat), chunk, parts))


@pytest.mark.parametrize("case,scenario", [*TRAINING[:2], *slow(*TRAINING[2:4]), *TRAINING[4:]])
def test_golden_loss_and_gradients(assistant, case, scenario):
    loaded, expected = assistant(case), golden(case, scenario)
    config = loaded.config
    batch = golden_batch(expected, config)
    trained, frozen, _ = split(trained_params(loaded), groups_of(scenario))
    loss, count, grads = program(config, 3, 1, "none")(trained, frozen, batch)
    assert relative_error(loss, expected["loss"][0]) <= TOLERANCE
    assert count == (batch["targets"] != IGNORE_LABEL).sum()

    ours, published = hf_names(config, grads), published_gradients(expected)
    errors = {name: relative_error(ours[name], g) for name, g in published.items()}
    assert all(e <= GRADIENT_TOLERANCE for e in errors.values()), errors
    without = {name for name, g in ours.items() if not np.any(g)}
    assert set(ours) - without == set(published)
    norms = gradient_norms(case, scenario)
    if norms is not None and scenario != "training_stage1":
        untrained = {name for name in hf_names(config, frozen) if "vision_tower" not in name}
        assert without | untrained == {n for n, norm in norms.items() if norm is None and "vision_tower" not in n}


@pytest.mark.parametrize("case,scenario", [*slow(("image_c1", "training")), ("llava_v1_5", "training_stage1")])
def test_one_step_of_adamw(assistant, case, scenario):
    """As optax takes it on the published gradients in the published layout: clipped, two rates, no state for the rest."""
    loaded, expected = assistant(case), golden(case, scenario)
    config, groups = loaded.config, groups_of(scenario)
    step, state = stepping(config, trained_params(loaded), groups)
    new, metrics = step(state, golden_batch(expected, config))

    before, published = hf_names(config, state.trained), published_gradients(expected)
    grads = {name: published.get(name, np.zeros_like(p)) for name, p in before.items()}
    rates = {g.learning_rate for g in groups} - {None}
    adamw = {rate: optax.adamw(rate, 0.9, 0.999, 1e-8, weight_decay=0.0) for rate in rates}
    rate_of = {name: groups["mm_projector" not in name].learning_rate for name in before}
    reference = optax.chain(optax.clip_by_global_norm(0.5), optax.multi_transform(adamw, rate_of))
    updates, published_state = jax.jit(lambda g, p: reference.update(g, reference.init(p), p))(grads, before)

    after, errors = hf_names(config, new.trained), {}
    for name, update in jax.device_get(updates).items():
        clear = np.abs(grads[name]) > 1e-6 * np.abs(grads[name]).max()  # not mere rounding, as of the compressor's key bias
        got = np.where(clear, after[name] - before[name], 0)
        if clear.any():
            errors[name] = relative_error(got, np.where(clear, update, 0))
        else:
            assert not got.any()
    assert {n: e for n, e in errors.items() if e > 1e-3} == {}  # 1 + 1e-4, a norm's scale, is rounded to 1e-3 of the change
    assert set(errors) == set(published)
    for moment in ("mu", "nu"):  # which tell that the gradient was clipped; Adam's first update does not
        ours, theirs = hf_names(config, moments(new.optimizer, moment)), moments(published_state, moment)
        assert all(relative_error(ours[name], theirs[name]) <= 2 * GRADIENT_TOLERANCE for name in published)
    assert set(moments(new.optimizer, "mu")) == set(state.trained)

    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(published)), rel=GRADIENT_TOLERANCE) and new.step == 1
    assert sum(x.size for x in jax.tree.leaves(new.optimizer) if x.ndim) == 2 * sum(x.size for x in state.trained.values())


def moments(state, name):
    """Adam's averages of all groups, by parameter."""
    found = [tree for _, tree in optax.tree.get_all_with_path(state, name)]
    return {path: x for tree in found for path, x in tree.items() if isinstance(x, jax.Array)}


# ---- one batch, cut in different ways ---------------------------------------------------------------------------------


def rows(seed, count, images):
    """Prompts of different lengths with two turns, the first answer in the middle."""
    rng = np.random.default_rng(seed)
    for b in range(count):
        ids = rng.integers(3, 512, 14 + b % 5).astype(np.int32)
        labels = np.full_like(ids, IGNORE_LABEL)
        labels[6:9], labels[-3:] = ids[6:9], ids[-3:]
        if b % 2:  # parts of a batch have different numbers of labels
            labels[7:9] = IGNORE_LABEL
        ids[[1, 4][: len(images)]] = -200
        yield Row(ids, images, labels)


@pytest.fixture
def example(assistant):
    """Sizes, parameters and eight rows of two pictures."""
    loaded = assistant("image_c1")
    pixels = np.random.default_rng(1).integers(0, 256, (16, 1, 56, 56, 3), dtype=np.uint8)
    return loaded.config, trained_params(loaded), batch_of(list(rows(0, 8, (1, 1))), loaded.config, pixels)


def run(config, params, batch, *, chunk=256, parts=1, remat="none"):
    """Loss, labels and gradients on the host."""
    trained, frozen, _ = split(params, STAGE_2)
    return jax.device_get(program(config, chunk, parts, remat)(trained, frozen, batch))


def assert_same(got, expected, tolerance):
    """Loss and gradients as a whole within the tolerance, each gradient within its tenfold."""
    assert got[0] == pytest.approx(expected[0], rel=tolerance) and got[1] == expected[1]
    whole = optax.tree.norm(expected[2])
    assert optax.tree.norm(optax.tree.sub(got[2], expected[2])) <= tolerance * whole
    errors = {p: relative_error(got[2][p], g) for p, g in expected[2].items() if np.abs(g).max() > 1e-7 * whole}
    assert set(expected[2]) - set(errors) == {"embed_tokens/embedding", "compressor/attn/k_proj/bias"}
    assert {p: e for p, e in errors.items() if e > 10 * tolerance} == {}


@pytest.mark.parametrize(
    "settings",
    slow({"parts": 2, "chunk": 5}, *({"remat": kind} for kind in REMAT[1:])),
    ids=lambda s: "-".join(f"{k}-{v}" for k, v in s.items()),
)
def test_the_same_step_cut_differently(example, settings):
    assert_same(run(*example, **settings), run(*example), 1e-6)


def test_on_eight_devices_as_on_one(example):
    config, params, batch = example
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        arrays = {k: jax.device_put(v, sharding.array_sharding(mesh, v.shape, "batch")) for k, v in batch.items()}
        got = run(config, placed, arrays, parts=2)
    assert_same(got, run(*example), 1e-5)


def test_every_label_counts_the_same(example):
    """Also where a row has none, as that of a picture that cannot be read."""
    config, params, batch = example
    without, alone = ({k: v.copy() for k, v in batch.items()} for _ in range(2))
    without["targets"][5] = alone["targets"][np.arange(8) != 5] = IGNORE_LABEL
    alone["targets"][5, 2:] = IGNORE_LABEL
    batch = batch | {"targets": np.where(alone["targets"] >= 0, alone["targets"], without["targets"])}
    parts = [run(config, params, arrays) for arrays in (batch, without, alone)]
    assert [part[1] for part in parts] == [38, 36, 2]
    for path, grad in parts[0][2].items():
        np.testing.assert_allclose(38 * grad, 36 * parts[1][2][path] + 2 * parts[2][2][path], atol=1e-4)


# ---- groups and schedule ----------------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_group():
    paths = ("layers/stack/mlp/up_proj/kernel", "layers/last/mlp/up_proj/kernel", "norm/scale", "mm_projector/linear_1/bias")
    groups = (GroupConfig(r"layers/mlp/.*", 1e-4), GroupConfig(r"norm/.*|mm_projector/.*"))
    assert assign_groups(paths, groups) == dict(zip(paths, (groups[0], groups[0], groups[1], groups[1])))
    wrong = (GroupConfig(r"layers/.*", 1e-4), GroupConfig(r".*kernel"), GroupConfig("nothing"))
    with pytest.raises(UserError) as error:
        assign_groups(paths, wrong)
    for part in ("layers/stack/mlp/up_proj/kernel is in 2 groups", "norm/scale is in 0 groups", "bias is in 0", "'nothing'"):
        assert part in str(error.value)


def test_schedule_warms_up_and_decays():
    rate = schedule(OptimizerConfig(warmup=0.1, final=0.1), 2.0, 100)
    assert [float(rate(s)) for s in (0, 5, 10, 55, 100)] == pytest.approx([0, 1, 2, 1.1, 0.2])
    assert float(schedule(OptimizerConfig(warmup=0.0), 2.0, 100)(0)) == 2.0

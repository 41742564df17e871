"""Muon: which parameters are matrices, and that each is updated as the plain matrix it stands for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import slow

from configs import demo
from lmm_jax import sharding
from lmm_jax.config import CompressorConfig
from train.config import GroupConfig, LoraConfig, OptimizerConfig
from train.optimizer import make_optimizer, matrix_axes
from train.start import abstract_start

SHAPES = {
    "layers/stack/self_attn/q_proj/kernel": (3, 8, 2, 6),
    "layers/stack/self_attn/o_proj/kernel": (3, 2, 6, 8),
    "layers/last/mlp/up_proj/kernel": (8, 20),
    "layers/last/self_attn/o_proj/kernel": (2, 6, 8),
    "lm_head/kernel": (8, 16),
    "norm/scale": (8,),
}
MATRICES = {  # shapes of the plain matrices, layer by layer
    "layers/stack/self_attn/q_proj/kernel": (3, 8, 12),
    "layers/stack/self_attn/o_proj/kernel": (3, 12, 8),
    "layers/last/mlp/up_proj/kernel": (1, 8, 20),
    "layers/last/self_attn/o_proj/kernel": (1, 12, 8),
}


def test_every_matrix_of_the_model_has_the_widths_of_its_module() -> None:
    """Rows are what a projection reads, columns what it writes."""
    sizes = dataclasses.replace(demo.model(), compressor=CompressorConfig(1), prefusion_layers=2)
    d, f, v, w = sizes.decoder.hidden_size, sizes.decoder.intermediate_size, sizes.vision.hidden_size, 512
    leaves = sharding.leaf_paths(abstract_start(sizes, LoraConfig(2), sharding.make_mesh("data=1"), lambda _: jnp.float32))
    width = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d), "fc1": (v, w), "fc2": (w, v)}
    width |= {"linear_1": (v, d), "linear_2": (d, d)}
    seen = set()
    for path, leaf in leaves.items():
        axes = matrix_axes(path, leaf)
        module, name = path.split("/")[-2:]
        assert (axes is not None) == (name == "kernel" and module != "patch_embedding"), path
        if axes is None:
            continue
        size = d if path.startswith(("layers/", "prefusion_layers/")) else v
        rows, columns = (int(np.prod([leaf.shape[axis] for axis in part])) for part in axes)
        assert (rows, columns) == width.get(module, (size, size)), path
        assert np.prod(leaf.shape) == rows * columns * (leaf.shape[0] if "/stack/" in path else 1), path
        seen.add(module)
    assert seen >= {*width, "q_proj", "k_proj", "v_proj", "o_proj", "out_proj"}


@pytest.mark.parametrize("decay", [0.1, *slow(0.0)])
def test_muon_updates_each_matrix_on_its_own_and_adamw_the_rest(decay: float) -> None:
    """Against optax on single two-dimensional matrices, over three steps."""
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
    first, others = GroupConfig("layers/stack/.*", 1e-2, decay), GroupConfig("(?!layers/stack/).*", 1e-2, decay)
    groups = {path: first if "/stack/" in path else others for path in params}
    ours = make_optimizer(OptimizerConfig((first, others), warmup=0.0, final=1.0, clip=0.0, method="muon"), groups, 10)
    muon = optax.contrib.muon(1e-2, weight_decay=decay, consistent_rms=0.2)
    adamw = optax.adamw(1e-2, weight_decay=decay, nesterov=True)
    plain = {
        (path, i): part
        for path, leaf in params.items()
        for i, part in enumerate(leaf.reshape(MATRICES.get(path, (1, *leaf.shape))))
    }
    state = ours.init(params)
    states = {key: (muon if key[0] in MATRICES else adamw).init(part) for key, part in plain.items()}
    for _ in range(3):
        grads = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()}
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for (path, i), part in plain.items():
            gradient = grads[path].reshape(MATRICES.get(path, (1, *grads[path].shape)))[i]
            update, states[path, i] = (muon if path in MATRICES else adamw).update(gradient, states[path, i], part)
            plain[path, i] = optax.apply_updates(part, update)
    for (path, i), part in plain.items():
        found = params[path].reshape(MATRICES.get(path, (1, *params[path].shape)))[i]
        np.testing.assert_allclose(found, part, rtol=1e-5, atol=1e-6, err_msg=path)


def test_moments_of_muon_lie_as_their_parameters_and_a_step_keeps_shapes() -> None:
    """One momentum for a matrix, two moments for what AdamW updates."""
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    groups = dict.fromkeys(params, GroupConfig(".*", 1e-2))
    optimizer = make_optimizer(OptimizerConfig((groups["norm/scale"],), method="muon"), groups, 10)
    state = optimizer.init(params)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    matrices = sum(int(np.prod(SHAPES[path])) for path in MATRICES)
    rest = sum(leaf.size for leaf in params.values()) - matrices
    coefficients = 3
    assert sizes == matrices + 2 * rest + coefficients

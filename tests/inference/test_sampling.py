"""Settings of sampling, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmm_jax
from lmm_jax.errors import UserError
from lmm_jax.inference.sampling import Sampler, Sampling, sample


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2**31},
        {"seed": -1},
        {"max_new_tokens": 2.5},
    ],
)
def test_settings_out_of_range(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        Sampling(**fields)


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    count = 4000

    def frequencies(**settings):
        sampler = Sampler.of([Sampling(temperature=1.0, seed=7) if not settings else Sampling(seed=7, **settings)] * count)
        drawn = sample(jnp.tile(logits, (count, 1)), sampler, jnp.arange(count))
        return np.bincount(np.asarray(drawn), minlength=4) / count

    np.testing.assert_allclose(frequencies(), [0.5, 0.25, 0.15, 0.1], atol=0.03)
    np.testing.assert_allclose(frequencies(temperature=0.5), np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345, atol=0.03)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_array_equal(frequencies(temperature=1.0, top_p=0.3), [1, 0, 0, 0])
    np.testing.assert_array_equal(frequencies(temperature=0.0), [1, 0, 0, 0])


def test_who_draws_needs_programs_that_draw():
    with pytest.raises(ValueError, match="a row draws"):
        Sampler.of([Sampling(), Sampling(temperature=0.5)], draws=False)


@pytest.mark.parametrize("draws", [False, True])
def test_programs_draw_only_where_a_row_may(tiny, draws):
    engine = lmm_jax.load(tiny("tiny")).engine
    programs, stop, one = engine.programs, np.array([2], np.int32), np.int32(1)
    with jax.set_mesh(engine.mesh):
        state = programs.empty(2, 64, 8, draws)
        program = programs.decode.lower(engine.params, state, stop, one, one).as_text()
    assert ("stablehlo.sort" in program) == draws

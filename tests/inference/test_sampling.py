"""Settings of sampling, and what is drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

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

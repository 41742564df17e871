"""The table of parameters, against what the modules declare."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lmm_jax.config import named_sizes
from lmm_jax.models.llava_mini import LlavaMini
from lmm_jax.models.shapes import param_shapes

SIZES = named_sizes()
TINY = SIZES["tiny"]
ONE_LAYER = dataclasses.replace(
    TINY, prefusion_layers=1, decoder=dataclasses.replace(TINY.decoder, num_layers=1, tie_word_embeddings=True)
)


@pytest.mark.parametrize("config", [*SIZES.values(), ONE_LAYER], ids=[*SIZES, "one layer"])
def test_the_table_is_what_the_modules_declare(config):
    side = config.vision.image_size
    pixels, ids = jnp.zeros((1, config.tiles, side, side, 3)), jnp.zeros((1, 8), jnp.int32)
    declared = jax.eval_shape(lambda: LlavaMini(config).init(jax.random.key(0), pixels, ids)["params"])
    assert param_shapes(config) == declared

"""Parts that the golden arrays show at one size only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import slow

from lmm_jax.config import CompressorConfig, VisionConfig, named_sizes
from lmm_jax.models.compressor import bicubic_weights, sincos_2d
from lmm_jax.models.layers import rotary_frequencies
from lmm_jax.models.llava_mini import LlavaMini, abstract_params, init_params
from lmm_jax.sharding import make_mesh

# rows of torch.nn.functional.interpolate(mode="bicubic", align_corners=False) on unit vectors, torch 2.13
TORCH_BICUBIC = {
    (3, 5, 1): [0.6119996905326843, 0.46000003814697266, -0.07199978828430176],
    (2, 7, 0): [1.110695719718933, -0.11069583892822266],
    (2, 7, 4): [0.19023293256759644, 0.8097668290138245],
    (4, 24, 9): [-0.05251741409301758, 0.9850983619689941, 0.07219332456588745, -0.004774332046508789],
    (4, 24, 23): [0.0, 0.0, -0.10633659362792969, 1.1063368320465088],
    (5, 3, 0): [0.6851851344108582, 0.37037038803100586, -0.05555534362792969, 0.0, 0.0],
}


@pytest.mark.parametrize("source,target,row", TORCH_BICUBIC)
def test_bicubic_is_that_of_torch(source, target, row):
    weights = bicubic_weights(source, target)
    assert weights.shape == (target, source)
    np.testing.assert_allclose(weights[row], TORCH_BICUBIC[source, target, row], atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_positions_encode_columns_first():
    table = sincos_2d(3, 8).reshape(3, 3, 8)
    np.testing.assert_allclose(table[2, 1, :4], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)], rtol=1e-6)
    np.testing.assert_allclose(table[2, 1, 4:], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], rtol=1e-6)


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("size", [3, *slow(1, 24)])
def test_any_compression_and_resolution(size, ratio):
    base = named_sizes()["tiny"]
    config = dataclasses.replace(base, compressor=CompressorConfig(size), resolution_ratio=ratio)
    params = init_params(config, make_mesh())
    side = config.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (2, config.tiles, side, side, 3), dtype=np.uint8)

    @jax.jit
    def run(pixels):
        prefix = LlavaMini(config).apply({"params": params}, pixels, method="encode_image")
        return prefix, LlavaMini(config).apply({"params": params}, jnp.ones((2, 5, 128)), prefix, method="fuse_text")

    prefix, text = run(pixels)
    assert prefix.tokens.shape == (2, size**2, 128) and text.shape == (2, 5, 128)
    assert prefix.layers["stack"][0].shape == (2, 2, config.prefix_length, 8, 16)
    assert jnp.isfinite(text).all() and not jnp.allclose(prefix.tokens[0], prefix.tokens[1])


def test_one_prefusion_layer_and_one_decoder_layer():
    base = named_sizes()["tiny"]
    config = dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, num_layers=1), prefusion_layers=1)
    params = init_params(config, make_mesh())
    assert "stack" not in params["layers"] and "stack" not in params["prefusion_layers"]
    pixels = jnp.zeros((1, 1, 56, 56, 3))
    logits = jax.jit(LlavaMini(config).apply)({"params": params}, pixels, jnp.zeros((1, 4), jnp.int32))
    assert logits.shape == (1, 5, 512)


@pytest.mark.slow
def test_tied_head_is_the_embedding():
    base = named_sizes()["tiny"]
    tied = dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, tie_word_embeddings=True))
    params = init_params(tied, make_mesh())
    assert "lm_head" not in params
    untied = {**params, "lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}
    x = jax.random.normal(jax.random.key(0), (1, 6, 128))
    expected, got = (
        jax.jit(lambda x, p, c: LlavaMini(c).apply({"params": p}, x, method="decode")[0], static_argnums=2)(x, p, c)
        for p, c in ((untied, base), (params, tied))
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_long_wavelengths_are_stretched_only():
    scaling = named_sizes()["llava-mini-llama-3.1-8b"].decoder.rope_scaling
    plain, scaled = rotary_frequencies(128, 5e5, None), rotary_frequencies(128, 5e5, scaling)
    np.testing.assert_array_equal(scaled[:20], plain[:20])
    np.testing.assert_allclose(scaled[-10:], plain[-10:] / 8, rtol=1e-6)


@pytest.mark.parametrize(
    "size,billions",
    [("llava-mini-llama-3.1-8b", 9.22), ("llava-mini-vicuna-7b", 7.86), ("llava-v1.5-7b", 7.05)],
)
def test_full_sizes_without_memory(size, billions):
    config = named_sizes()[size]
    leaves = jax.tree.leaves(abstract_params(config, make_mesh(), jnp.bfloat16))
    assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(billions, abs=0.01)
    shape = jax.ShapeDtypeStruct((1, config.tiles, 336, 336, 3), jnp.uint8)
    abstract = abstract_params(config, make_mesh(), jnp.bfloat16)
    model = LlavaMini(config, jnp.bfloat16)
    prefix = jax.eval_shape(lambda p, x: model.apply({"params": p}, x, method="encode_image"), abstract, shape)
    assert prefix.tokens.shape == (1, config.tokens_per_image, 4096)
    if size == "llava-mini-llama-3.1-8b":  # the prefix of an image is 9.5 MB
        assert sum(x.size * 2 for x in jax.tree.leaves(prefix)) == pytest.approx(9.46e6, rel=0.01)


def test_the_last_vision_block_is_not_a_parameter():
    config = dataclasses.replace(named_sizes()["tiny"], vision=VisionConfig(64, 128, 5, 8, 14, 56, name=""))
    stack = abstract_params(config, make_mesh())["vision_tower"]["layers"]["stack"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stack)} == {4}

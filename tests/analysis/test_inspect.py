"""What a model looks at: against the model's own logits, against plain NumPy, and as a user sees it."""

import numpy as np
import pytest
from PIL import Image
from support import GOLDEN, slow

import lmm_jax
from lmm_jax.analysis import attention
from lmm_jax.analysis.attention import TYPES
from lmm_jax.analysis.compression import compression_maps
from lmm_jax.cli import main
from lmm_jax.data.conversation import Message, render
from lmm_jax.data.layout import Row
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Conversation, Question

PICTURE = str(GOLDEN / "preprocessing" / "odd.png")
CLIP = str(GOLDEN.parents[1] / "examples" / "moving.mp4")
VISION = TYPES.index("vision")


def given(model, images=(PICTURE,), answer="red"):
    asked = model.extend(Conversation(), Question("What is it?", list(images)))
    told = Conversation((*asked.messages, Message("assistant", answer)), asked.media)
    return told, attention.decoder_input(model, told, list(told.media), None)


@pytest.mark.parametrize("size", ["tiny", *slow("tiny-hd", "tiny-llava-v1.5")])
def test_layer_by_layer_is_the_model(tiny, size):
    model = lmm_jax.load(tiny(size))
    told, x = given(model, (PICTURE, GOLDEN / "preprocessing" / "wide.png") if size == "tiny" else (PICTURE,))
    seen = attention.look(model, x)
    ids, labels = model.tokenizer.encode(render(told.messages, model.config.template, model.tokenizer, generate=False))
    logits, layout = model.engine.logits([Row(ids, (1,) * len(told.media), labels)], [told.media])
    expected = np.exp(logits[0, : layout.lengths[0]][-len(x.answer) - 1 : -1].astype(np.float64))
    np.testing.assert_allclose(seen.probabilities, expected / expected.sum(-1, keepdims=True), rtol=1e-4, atol=1e-7)
    assert (np.bincount(x.types, minlength=3) > 0).all()
    assert (x.types == VISION).sum() == len(told.media) * model.config.tokens_per_image
    layers = model.config.decoder.num_layers
    assert seen.weights.shape == seen.entropy.shape == (layers, 3, 3)
    np.testing.assert_allclose(seen.weights.sum(-1), 1, rtol=1e-5)
    assert (seen.weights[:, TYPES.index("instruction"), TYPES.index("response")] == 0).all()
    limit = np.log(np.bincount(x.types, minlength=3))
    assert (np.nan_to_num(seen.entropy) <= limit + 1e-5).all() and np.nanmin(seen.entropy) > -1e-5


def test_weights_and_entropies_of_uniform_attention(tiny):
    """Queries of nothing look at all keys alike: what is counted then is known."""
    import jax
    import jax.numpy as jnp

    model = lmm_jax.load(tiny("tiny"))
    _, x = given(model)
    params = attention._layer_params(model.engine.params["layers"], 0, model.config.decoder.num_layers)
    params = jax.tree.map(lambda leaf: leaf, params)
    params["self_attn"]["q_proj"]["kernel"] = jnp.zeros_like(params["self_attn"]["q_proj"]["kernel"])
    length = len(x.types)
    mask, groups = np.tril(np.ones((1, length, length), bool)), np.eye(3, dtype=np.float32)[x.types]
    _, weights, entropy = attention._layer(model.config.decoder, params, x.x, mask, groups)
    before = np.cumsum(groups, axis=0)  # keys of each type that a position sees
    for a in range(3):
        rows = before[x.types == a]
        np.testing.assert_allclose(weights[a], (rows / rows.sum(1, keepdims=True)).mean(0), rtol=1e-5, atol=1e-7)
        with np.errstate(divide="ignore"):
            logs = np.where(rows > 0, np.log(rows), np.nan)
        expected = [column[np.isfinite(column)].mean() if np.isfinite(column).any() else np.nan for column in logs.T]
        np.testing.assert_allclose(entropy[a], expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_that_may_not_look_does_not_see(tiny):
    """Without pre-fusion the picture reaches the words through attention only."""
    model = lmm_jax.load(tiny("tiny-llava-v1.5"))
    pictures = [np.random.default_rng(seed).integers(0, 256, (80, 80, 3), np.uint8) for seed in (1, 2)]
    (_, one), (_, two) = (given(model, [Image.fromarray(p)]) for p in pictures)
    everywhere = range(model.config.decoder.num_layers)
    blind = [attention.look(model, x, everywhere).probabilities for x in (one, two)]
    np.testing.assert_allclose(*blind, rtol=1e-5)
    seeing = [attention.look(model, x) for x in (one, two)]
    assert np.abs(seeing[0].probabilities - seeing[1].probabilities).max() > 1e-4
    assert attention.divergence(seeing[0], seeing[0]) == 0
    some = attention.look(model, one, [0])
    assert attention.divergence(seeing[0], some) > 1e-6
    own = attention.look(model, one, everywhere).weights
    assert (own[:, [0, 2], VISION] == 0).all() and (own[:, VISION, VISION] > 0).all()


@pytest.mark.parametrize("size", ["tiny", "tiny-hd"])
def test_compression_maps(tiny, size):
    model = lmm_jax.load(tiny(size))
    config = model.config
    found = compression_maps(model, model.read_picture(PICTURE))
    side = config.resolution_ratio * config.vision.grid
    assert found.shape == (config.tokens_per_image, side, side)
    np.testing.assert_allclose(found.sum((1, 2)), 1, rtol=1e-5)
    with pytest.raises(UserError, match="no compressor"):
        plain = lmm_jax.load(tiny("tiny-llava-v1.5"))
        compression_maps(plain, plain.read_picture(PICTURE))


@pytest.mark.parametrize("size,media", [("tiny", ["--video", CLIP]), ("tiny-llava-v1.5", ["--image", PICTURE])])
def test_the_command(capsys, tiny, tmp_path, size, media):
    words = ["inspect", "--model", str(tiny(size)), *media, "--answer", "blue", "--group", "3", "What?"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("answer: blue\n") and "| 0 to 2 |" in out and "| 3 to 3 |" in out
    names = {"inspect.npz", "attention.png", "hidden.png"} | ({"compression.png"} if size == "tiny" else set())
    assert {f.name for f in (tmp_path / "out").iterdir()} == names
    arrays = np.load(tmp_path / "out" / "inspect.npz")
    assert arrays["weights"].shape == (4, 3, 3) and arrays["hidden"].shape == (2, 3)
    assert ("map_0" in arrays) == (size == "tiny")


@pytest.mark.parametrize(
    "words,told",
    [
        (["What?"], "--image"),
        (["What?", "--image", PICTURE, "--group", "0"], "at least 1"),
        (["What?", "--image", PICTURE, "--answer", " "], "no words"),
        (["What?", "--image", "none.png"], "none.png"),
    ],
)
def test_bad_arguments(capsys, tiny, tmp_path, words, told):
    assert main(["inspect", "--model", str(tiny("tiny")), "--out", str(tmp_path), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and told in err and len(err.splitlines()) == 1

"""Layers apart and kernels turned, as inference on a processor has them: the same numbers, and taken by large models alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import GOLDEN, relative_error, slow, trained_params

import lmm_jax
from lmm_jax.analysis import attention
from lmm_jax.config import named_sizes
from lmm_jax.data.conversation import Message
from lmm_jax.data.layout import Row
from lmm_jax.inference import images
from lmm_jax.inference.assistant import Conversation, Question
from lmm_jax.models import apart
from lmm_jax.models.llava_mini import abstract_params
from lmm_jax.sharding import make_mesh

PICTURES = [str(GOLDEN / "preprocessing" / name) for name in ("odd.png", "wide.png")]


@pytest.mark.parametrize("size", ["tiny", *slow("tiny-hd", "tiny-llava-v1.5")])
def test_the_same_logits_and_answers(tiny, size, monkeypatch):
    stacked = lmm_jax.load(tiny(size))
    monkeypatch.setattr(apart, "LARGE", 0)
    monkeypatch.setattr(images, "CACHE_BYTES", 0)  # one picture at a time
    separate = lmm_jax.load(tiny(size))
    kernels = separate.engine.params["layers"]["stack"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernels, tuple) and all(apart.is_turned(kernel) for kernel in kernels)

    asked = stacked.extend(Conversation(), Question("What is it?", PICTURES))
    ids = np.concatenate([[2, -200, -200], np.arange(5, 30)]).astype(np.int32)
    both = [model.engine.logits([Row(ids, (1, 1))], [asked.media])[0] for model in (stacked, separate)]
    assert relative_error(both[1], both[0]) < 1e-5
    questions = [Question("What is it?", PICTURES[:n]) for n in (0, 1, 2)] + [Question("Where?", PICTURES[1:])]
    said = [model.ask_batch(questions, max_new_tokens=6) for model in (stacked, separate)]
    assert said[0] == said[1]
    told = Conversation((*asked.messages, Message("assistant", "red")), asked.media)
    given = [attention.decoder_input(model, told, list(told.media), None) for model in (stacked, separate)]
    seen = [attention.look(model, x).weights for model, x in zip((stacked, separate), given)]
    assert relative_error(seen[1], seen[0]) < 1e-4


@pytest.mark.parametrize("rows", [1, 3, apart.FEW, apart.FEW + 1])
def test_a_product_with_a_turned_kernel(rows):
    x, kernel = (np.random.default_rng(rows).normal(size=shape).astype(np.float32) for shape in ((2, rows, 4, 6), (10, 24)))
    got = jax.jit(lambda x, k: apart.project(x, {"turned": k}, 2, (2, 5), None))(x[:1], kernel)
    assert got.shape == (1, rows, 2, 5)
    assert relative_error(got.reshape(rows, 10), x[0].reshape(rows, 24) @ kernel.T) < 1e-6
    wide = apart.project(jnp.asarray(x, jnp.bfloat16), {"turned": kernel}, 2, (10,), jnp.float32)
    assert wide.shape == (2, rows, 10) and wide.dtype == jnp.float32
    assert apart.project(jnp.asarray(x, jnp.bfloat16), {"turned": kernel}, 2, (10,), None).dtype == jnp.bfloat16


def test_who_takes_it():
    large, small = (abstract_params(named_sizes()[name], make_mesh()) for name in ("llava-mini-vicuna-7b", "tiny"))
    assert apart.is_wanted(large, make_mesh()) and not apart.is_wanted(small, make_mesh())
    assert not apart.is_wanted(large, make_mesh("fsdp=8"))


@pytest.mark.parametrize("kept", ["int8", *slow(None)])
def test_a_whole_stack_is_one_scan(tiny, kept):
    """The same logits and answers as with the last layer by itself, and a decode step has one layer less to compile."""
    whole, other = (lmm_jax.load(tiny("tiny"), kv_cache=kept) for _ in range(2))
    other.engine.params = trained_params(other)
    sizes = [len(m.engine.params["layers"]["stack"]["input_layernorm"]["scale"]) for m in (whole, other)]
    assert sizes[0] == sizes[1] + 1 == whole.config.decoder.num_layers
    ids = np.concatenate([[2, -200], np.arange(5, 30)]).astype(np.int32)
    pixels = np.random.default_rng(3).integers(0, 256, (1, 56, 56, 3), np.uint8)
    logits = [model.engine.logits([Row(ids, (1,))], [[pixels]])[0] for model in (whole, other)]
    assert relative_error(logits[0], logits[1]) < 1e-5
    questions = [Question("What is it?", PICTURES[:n]) for n in (0, 1, 2)]
    assert whole.ask_batch(questions, max_new_tokens=6) == other.ask_batch(questions, max_new_tokens=6)
    assert [decode_products(model.engine) for model in (whole, other)] == [9 + 1, 2 * 9 + 1]


@pytest.mark.parametrize("large", [0, *slow(apart.LARGE)])
def test_what_is_loaded_is_what_is_measured(tiny, large, monkeypatch):
    """`lmm report` times parameters that it draws in the form in which others are loaded."""
    monkeypatch.setattr(apart, "LARGE", large)
    loaded = lmm_jax.load(tiny("tiny"))
    made = apart.as_loaded(trained_params(loaded), loaded.engine.mesh)
    jax.tree.map(np.testing.assert_array_equal, made, loaded.engine.params)
    assert apart.as_loaded(made, make_mesh("fsdp=8")) is made


def decode_products(engine):
    """Matrix products in the program of a decode step: those of scanned layers once, and the logits'."""
    one = np.int32(1)
    with jax.set_mesh(engine.mesh):
        state = engine.programs.empty(1, 64, 16, False)
        lowered = engine.programs.decode.lower(engine.params, state, np.array([-1], np.int32), one, one)
    return lowered.as_text().count("dot_general")


def test_weights_in_few_bits_stay_stacked(tiny, monkeypatch):
    monkeypatch.setattr(apart, "LARGE", 0)
    params = lmm_jax.load(tiny("tiny"), quantize="int8").engine.params
    assert not apart.is_apart(params["layers"]["stack"]) and not any(isinstance(x, tuple) for x in jax.tree.leaves(params))

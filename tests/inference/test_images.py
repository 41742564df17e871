"""The image side of inference: pictures are encoded once, remembered, and not mixed up."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import mixed_requests, picture, prompt, slow

import lmm_jax
from lmm_jax.errors import DeviceError
from lmm_jax.inference.engine import Request
from lmm_jax.inference.sampling import Sampling

STOP = (2,)


def test_second_question_on_a_picture_is_not_encoded_again(tiny, monkeypatch):
    engine = lmm_jax.load(tiny("tiny")).engine
    calls = []
    encode = engine.images._encode
    monkeypatch.setattr(engine.images, "_encode", lambda *args: calls.append(1) or encode(*args))
    image, sampling = picture(0, engine.config), Sampling(4)
    first = engine.generate([Request(prompt(0, 9, 1), [image], sampling)], STOP)
    second = engine.generate([Request(prompt(1, 9, 1), [image], sampling)], STOP)
    assert len(calls) == 1
    both = engine.generate([Request(prompt(i, 9, 1), [image.copy()], sampling) for i in range(2)], STOP)
    assert both == first + second and len(calls) == 1
    uncached = lmm_jax.load(tiny("tiny"), prefix_cache_bytes=0).engine
    assert both == uncached.generate([Request(prompt(i, 9, 1), [image], sampling) for i in range(2)], STOP)


def test_prefix_cache_is_bounded(tiny):
    engine = lmm_jax.load(tiny("tiny")).engine
    one = engine.images.prefix_bytes
    engine = lmm_jax.load(tiny("tiny"), prefix_cache_bytes=3 * one).engine
    cache, pictures = engine.images.prefixes, [picture(i, engine.config) for i in range(4)]
    for image in (*pictures, pictures[0]):
        engine.generate([Request(prompt(0, 9, 1), [image], Sampling(1))], STOP)
    assert cache.bytes == 3 * one
    kept = [cache.get(cache.key(p)) is not None for p in pictures]
    assert kept == [True, False, True, True]  # number 1 is the least recently used
    engine.generate([Request(prompt(0, 9, 1), [pictures * 2], Sampling(1))], STOP)  # a video that is too long passes by
    assert [cache.get(cache.key(p)) is not None for p in pictures] == kept


def test_a_new_picture_beside_known_ones_is_encoded_alone(tiny, monkeypatch):
    engine = lmm_jax.load(tiny("tiny")).engine
    sizes, encode = [], engine.images._encode
    monkeypatch.setattr(engine.images, "_encode", lambda p, x: sizes.append(len(x)) or encode(p, x))
    pictures = [picture(i, engine.config) for i in range(5)]
    for n in range(1, 6):
        engine.generate([Request(prompt(n, 20, n), pictures[:n], Sampling(1))], STOP)
    assert sizes == [1] * 5


@pytest.mark.parametrize("cache", [0, 2**30])
def test_pictures_that_are_encoded_one_by_one_are_not_mixed_up(tiny, monkeypatch, cache):
    """Two threads start them in turn."""
    engine = lmm_jax.load(tiny("tiny"), prefix_cache_bytes=cache).engine
    requests = mixed_requests(engine.config, 9)
    expected = engine.generate(requests, STOP)
    starts, encode = [], engine.images._encode

    def counting(params, pixels):
        starts.append((threading.get_ident(), len(pixels)))
        return encode(params, pixels)

    monkeypatch.setattr(engine.images, "_encode", counting)
    monkeypatch.setattr(engine.images, "at_once", 1)
    engine.images.prefixes.clear()
    assert engine.generate(requests, STOP) == expected
    threads = [thread for thread, _ in starts]
    images = sum(sum(r.row().images) for r in requests)
    assert [size for _, size in starts] == [1] * images and 0 <= threads.count(threads[0]) - images / 2 <= 1
    assert len(set(threads)) == 2

    def failing(params, pixels):
        if threading.get_ident() != threads[0]:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device has gone")
        return encode(params, pixels)

    monkeypatch.setattr(engine.images, "_encode", failing)
    engine.images.prefixes.clear()
    with pytest.raises(DeviceError, match="the device has gone"):
        engine.generate(requests, STOP)


@pytest.mark.parametrize(
    "size, mesh", [("tiny", None), *slow(("tiny-hd", None), ("tiny-llava-v1.5", None), ("tiny", "tensor=2"))]
)
def test_questions_about_one_picture_share_its_prefix(tiny, monkeypatch, size, mesh):
    engine = lmm_jax.load(tiny(size), mesh=mesh).engine
    requests = [Request(prompt(i, 9 + i, 1), [picture(i // 5, engine.config)], Sampling(4)) for i in range(10)]
    alone = [engine.generate([request], STOP)[0] for request in requests]
    joined, join = [], engine.images._join
    monkeypatch.setattr(engine.images, "_join", lambda parts: joined.append(len(parts)) or join(parts))
    monkeypatch.setattr(engine.images, "chunk", 5)
    assert engine.generate(requests, STOP) == alone and not joined
    monkeypatch.setattr(engine.images, "chunk", 4)  # 0 0 0 0, 0 1 1 1, 1 1
    assert engine.generate(requests, STOP) == alone and joined == [4]


def test_rows_that_share_a_prefix_are_fused_as_with_their_own(tiny):
    engine = lmm_jax.load(tiny("tiny")).engine
    model, params = engine.images._model, {"params": engine.params}
    encode, fuse = (jax.jit(lambda *xs, m=m: model.apply(params, *xs, method=m)) for m in ("encode_image", "fuse_text"))
    text = model.apply(params, jnp.array([prompt(i, 7, 0) for i in range(6)]), method="embed")
    prefix = encode(np.stack([picture(i, engine.config) for i in range(2)]))
    own = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.repeat(x, 3, axis=1 if "stack" in jax.tree_util.keystr(path) else 0), prefix
    )
    np.testing.assert_allclose(fuse(text, prefix), fuse(text, own), rtol=1e-5, atol=1e-6)

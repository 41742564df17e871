"""Batches, streams, images and videos through the engine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import golden, mixed_requests, picture, prompt, relative_error, slow

import lmm_jax
from lmm_jax.data.layout import Row
from lmm_jax.errors import DeviceError, UserError
from lmm_jax.inference.buckets import length_bucket, power_of_two
from lmm_jax.inference.engine import YIELD_STEPS, Request
from lmm_jax.inference.images import CHUNK
from lmm_jax.inference.sampling import Sampling
from lmm_jax.models.llava_mini import LlavaMini

STOP = (2,)


@pytest.fixture(scope="module")
def model(tiny):
    return functools.cache(lambda name="tiny", **settings: lmm_jax.load(tiny(name), **settings))


@pytest.mark.parametrize("size", ["tiny", *slow("tiny-hd", "tiny-llava-v1.5")])
def test_batch_equals_asking_alone_and_streaming(model, size):
    engine = model(size).engine
    requests = mixed_requests(engine.config, 9)
    together = engine.generate(requests, STOP)
    assert together == [engine.generate([r], STOP)[0] for r in requests]
    assert together == [list(engine.stream(r, STOP)) for r in requests]
    assert all(0 < len(t) <= r.sampling.max_new_tokens for t, r in zip(together, requests))


def test_answers_of_one_token_take_no_decode_step(model, monkeypatch):
    engine = model().engine
    requests = mixed_requests(engine.config, 5)
    ones = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_new_tokens=1)) for r in requests]
    expected = [tokens[:1] for tokens in engine.generate(requests, STOP)]
    monkeypatch.setattr(engine.programs, "decode", None)
    assert engine.generate(ones, STOP) == expected == [list(engine.stream(r, STOP)) for r in ones]


def expected_logits(model, row, images):
    """By the definition: every image with the same text, mean of the fused texts, each placeholder its own tokens."""
    config = model.config
    jitted = jax.jit(LlavaMini(config).apply, static_argnames="method")
    apply = functools.partial(jitted, {"params": model.engine.params})
    text = apply(jnp.asarray(row.ids[row.ids > 0])[None], method="embed")
    prefixes = [apply(p[None], method="encode_image") for p in images]
    fused = iter(jnp.mean(jnp.stack([apply(text, p, method="fuse_text")[0] for p in prefixes]), axis=0))
    tokens, parts = iter(prefixes), []
    for token, count in zip(row.ids, expand(row)):
        parts += [next(tokens).tokens[0] for _ in range(count)] if token == -200 else [next(fused)[None]]
    return apply(jnp.concatenate(parts)[None], method="decode")[0][0]


def expand(row):
    images = iter(row.images)
    return [next(images) if token == -200 else 0 for token in row.ids]


@pytest.mark.parametrize("size", ["tiny", *slow("tiny-hd")])
@pytest.mark.parametrize("images", [(1, 1), (2 * CHUNK + 3,), (1, 5, 1)])
def test_images_and_frames_follow_the_definition(model, size, images):
    loaded = model(size)
    pictures = [picture(i, loaded.config) for i in range(sum(images))]
    row = Row(prompt(5, 11, len(images)), images)
    media, rest = [], iter(pictures)
    for count in images:
        media.append(next(rest) if count == 1 else [next(rest) for _ in range(count)])
    got, layout = loaded.engine.logits([row], [media])
    expected = expected_logits(loaded, row, pictures)
    assert relative_error(got[0, : layout.lengths[0]], expected) <= 1e-5


def test_video_that_ends_early_takes_the_room_of_its_real_frames(model):
    class Short(list):
        def __len__(self):
            return super().__len__() + 7

    engine = model().engine
    frames = [picture(i, engine.config) for i in range(4)]
    ids, sampling = prompt(0, 9, 1), Sampling(5)
    short = engine.generate([Request(ids, [Short(frames)], sampling)], STOP)
    assert short == engine.generate([Request(ids, [frames], sampling)], STOP)


def test_prompt_longer_than_the_context(model):
    engine = model().engine
    context = engine.config.decoder.max_position_embeddings
    with pytest.raises(UserError, match=f"{context + 10} positions.*context is {context}"):
        engine.generate([Request(prompt(0, context + 10, 0))], STOP)
    tokens = engine.generate([Request(prompt(0, context - 3, 0), sampling=Sampling(50))], ())[0]
    assert len(tokens) == 3  # the answer ends where the context does


@pytest.mark.parametrize("ids,media", [([5, -200], 0), ([5], 1), ([-200, -200], 1), ([5, 512], 0), ([5, -3], 0), ([], 0)])
def test_prompts_that_cannot_be(model, ids, media):
    engine = model().engine
    with pytest.raises(UserError):
        engine.generate([Request(np.array(ids, int), [picture(0, engine.config)] * media)], STOP)


def test_the_seed_decides(model):
    engine = model().engine

    def tokens(seed):
        return engine.generate([Request(prompt(0, 9, 0), sampling=Sampling(16, 1.0, seed=seed))], ())[0]

    assert tokens(1) == tokens(1) != tokens(2)


def test_buckets_are_few_and_large_enough():
    assert len({length_bucket(n) for n in range(1, 10001)}) <= 19
    for n in range(1, 10001):
        assert n <= length_bucket(n) <= max(24, 1.5 * n)
        assert n <= power_of_two(n) < 2 * n


@pytest.fixture
def compiled():
    """Grows by one for each program that is compiled."""
    compiled = []

    def on_event(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(on_event)


def random_requests(config, count):
    """Lengths 5-400, up to 3 images, every tenth with a video, all settings."""
    rng, requests = np.random.default_rng(0), []
    for i in range(count):
        media = [picture(j, config) for j in range(int(rng.integers(0, 4)))]
        if i % 10 == 0:
            media = [[picture(j, config) for j in range(int(rng.integers(1, 40)))]]
        ids = prompt(i, int(rng.integers(5, 400)), len(media))
        requests.append(Request(ids, media, Sampling(int(rng.integers(1, 17)), float(i % 2), seed=i)))
    return requests


@pytest.mark.slow
def test_compilations_are_bounded(tiny, compiled):
    """200 requests, alone and in batches."""
    engine = lmm_jax.load(tiny("tiny")).engine
    requests, before = random_requests(engine.config, 200), len(compiled)
    engine.generate(requests[:100], STOP)
    in_batches = len(compiled) - before
    for request in requests[100:]:
        list(engine.stream(request, STOP))
    alone = len(compiled) - before - in_batches
    engine.generate(requests[:100], STOP)
    lengths, counts = len({length_bucket(n) for n in range(5, 440)}), len({power_of_two(n) for n in range(1, CHUNK + 1)})
    images, programs = engine.images, engine.programs
    assert images._encode._cache_size() <= counts
    assert images._fuse._cache_size() <= 2 * counts * lengths  # with a prefix of each image, or of the one that all are
    assert programs.prefill._cache_size() <= 2 * lengths  # alone, and in batches
    # fuse and place by image count and length, text, sums of fused text, empty slots, prefill, insert and decode by length,
    # alone and in batches, the rest by image count
    assert in_batches + alone <= 3 * counts * lengths + 2 * 6 * lengths + 3 * counts, (in_batches, alone)
    assert in_batches + alone <= len(requests)  # requests share programs
    assert len(compiled) == before + in_batches + alone  # nothing is compiled twice


@pytest.mark.parametrize("mesh", [None, *slow("data=2,fsdp=2,tensor=2")])
def test_what_was_compiled_serves_again(tiny, compiled, mesh):
    """Also for other prompts, pictures and settings of like size, and on a mesh. Drawing needs programs of its own."""
    engine = lmm_jax.load(tiny("tiny"), mesh=mesh).engine
    counts = []
    for seed, temperature in enumerate((0.0, 0.0, 0.5, 1.0, 0.0)):
        media = [picture(seed, engine.config), [picture(100 + 20 * seed + j, engine.config) for j in range(10 + seed % 3)]]
        request = Request(prompt(seed, 16 + seed % 3, 2), media, Sampling(20 + seed % 3, temperature, seed=seed))
        list(engine.stream(request, ()))
        counts.append(len(compiled))
    assert counts[0] == counts[1] and counts[2] == counts[3] == counts[4]
    assert counts[2] == counts[1] + 3  # empty slots, entering, decoding


def test_another_engine_of_the_same_model_compiles_nothing(tiny, compiled):
    counts, answers = [], []
    for _ in range(2):
        engine = lmm_jax.load(tiny("tiny")).engine
        request = Request(prompt(0, 16, 1), [picture(0, engine.config)], Sampling(8))
        row = Row(prompt(0, 16, 0), labels=prompt(0, 16, 0))
        answers.append((engine.generate([request], STOP), engine.loss([row], [[]])))
        counts.append(len(compiled))
    assert counts[0] == counts[1] and answers[0] == answers[1]


@pytest.mark.slow
def test_mixed_requests_on_a_mesh(model):
    expected, got = (model(mesh=m).engine for m in (None, "data=2,fsdp=2,tensor=2"))
    requests = mixed_requests(expected.config, 9)
    assert got.generate(requests, STOP) == expected.generate(requests, STOP)
    assert got.generate(requests[:3], STOP) == expected.generate(requests[:3], STOP)  # pictures come from the cache


def test_groups_fit_the_memory(model):
    engine = model().engine
    short = [Request(prompt(i, 9, 0), sampling=Sampling(4)) for i in range(16)]
    long = [Request(prompt(i, 9, 0), sampling=Sampling(12000)) for i in range(16)]
    assert [(g.rows, len(g.members)) for g in engine._groups(short, 12)] == [(12, 16)]
    assert [(g.rows, len(g.members), g.length) for g in engine._groups(long, 32)] == [(8, 16, 24 + 2048)]
    both = engine._groups(short + long, 12)
    assert [len(g.members) for g in both] == [16, 16] and both[0].length < both[1].length
    few = engine._groups(short[:3] + long[:3], 12)
    assert [len(g.members) for g in few] == [6], "too few short ones to be worth a cache of their own"


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_rows_leave_and_others_enter(tiny, monkeypatch, mesh):
    """Short answers do not wait for long ones, and nobody sees who else was there."""
    engine = lmm_jax.load(tiny("tiny"), mesh=mesh).engine
    limits = [40, 3, 5, 2, 7, 3, 1, 4, 6, 2, 3, 5]
    requests = [Request(prompt(i, 10 + i % 3, 0), sampling=Sampling(n, seed=i)) for i, n in enumerate(limits)]
    steps, decode = [], engine.programs.decode

    def counting(params, state, *told):
        before = np.asarray(state.count)
        state = decode(params, state, *told)
        steps.append(int((np.asarray(state.count) - before).max()))
        return state

    monkeypatch.setattr(engine.programs, "decode", counting)
    done = list(engine.as_completed(requests, (), batch_size=4))
    assert sorted(i for i, _ in done) == list(range(12)) and all(len(tokens) == limits[i] for i, tokens in done)
    assert sum(steps) == 39, "the longest answer is all that is waited for"
    alone = lmm_jax.load(tiny("tiny")).engine
    assert dict(done) == {i: alone.generate([r], ())[0] for i, r in enumerate(requests)}


def test_a_long_video_does_not_hold_up_the_others(tiny, monkeypatch):
    """Between its chunks, those that generate get on."""
    engine = lmm_jax.load(tiny("tiny"), prefix_cache_bytes=0).engine
    requests = [Request(prompt(i, 9, 0), sampling=Sampling(n)) for i, n in enumerate((90, 90, 12))]
    frames = [picture(i, engine.config) for i in range(3 * CHUNK)]
    requests.append(Request(prompt(3, 9, 1), [frames], Sampling(2)))
    alone = {i: engine.generate([r], ())[0] for i, r in enumerate(requests)}
    events, decode, encode = [], engine.programs.decode, engine.images._encode

    def decoding(params, state, *told):
        before = int(state.count.max())
        state = decode(params, state, *told)
        events.append(int(state.count.max()) - before)
        return state

    def encoding(*told):
        events.append("chunk")
        return encode(*told)

    monkeypatch.setattr(engine.programs, "decode", decoding)
    monkeypatch.setattr(engine.images, "_encode", encoding)
    assert dict(engine.as_completed(requests, (), batch_size=3)) == alone
    first = events.index("chunk")
    assert events[first:][:5] == ["chunk", YIELD_STEPS, "chunk", YIELD_STEPS, "chunk"]


def test_a_cache_that_does_not_fit_is_made_smaller(model, monkeypatch):
    engine = model().engine
    requests = mixed_requests(engine.config, 9)
    expected, sizes, decode = engine.generate(requests, STOP), [], engine.programs.decode

    def failing(params, state, *told):
        sizes.append(len(state.done))
        if len(state.done) > 4:
            jax.tree.map(lambda x: x.delete(), state)  # as a donated cache is lost
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return decode(params, state, *told)

    monkeypatch.setattr(engine.programs, "decode", failing)
    assert engine.generate(requests, STOP) == expected
    assert max(sizes) > 4 and sizes[-1] <= 4

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device has gone\nmore")

    monkeypatch.setattr(engine.programs, "decode", broken)
    with pytest.raises(DeviceError, match="the device has gone"):
        engine.generate(requests, STOP)
    with pytest.raises(DeviceError, match="the device has gone"):
        list(engine.stream(requests[0], STOP))

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(engine.programs, "decode", full)
    with pytest.raises(UserError, match="memory is too small") as refused:
        engine.generate(requests[:1], STOP)
    assert not isinstance(refused.value, DeviceError)
    monkeypatch.setattr(engine.programs, "decode", decode)
    assert engine.generate(requests, STOP) == expected


@pytest.mark.slow
def test_bfloat16(assistant):
    """The default on GPU and TPU: near the golden logits, not rounded to bfloat16, and generating."""
    expected = golden("image_c1", "inference")
    loaded, real = assistant("image_c1", dtype="bfloat16"), expected["inputs_embeds_mask"] > 0
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.engine.params)} == {jnp.dtype("bfloat16")}
    inputs = expected["input_ids"], expected["attention_mask"], expected["pixel_values"]
    logits = loaded.logits(*inputs)
    assert relative_error(logits[real], expected["logits"][real]) <= 0.03
    assert (logits[real] != logits[real].astype(jnp.bfloat16)).any()
    tokens = loaded.generate(*inputs, max_new_tokens=8)
    assert tokens.shape == (2, 8) and (tokens >= 0).all()

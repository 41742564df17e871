"""How long the parts of a model take on the devices that are here; random weights of its sizes do for that."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmm_jax.analysis import costs
from lmm_jax.analysis.rehearsal import rehearse
from lmm_jax.config import IMAGE_TOKEN_ID, ModelConfig
from lmm_jax.inference.buckets import length_bucket
from lmm_jax.inference.engine import Engine, Request
from lmm_jax.inference.sampling import Sampling
from lmm_jax.models import apart, prefusion
from lmm_jax.models.llava_mini import ImagePrefix, LlavaMini, init_params

NEW_TOKENS = 16  # that the time of one is taken from


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a question about some images takes; times in seconds, medians.

    Attributes:
      name: of the variant.
      parts: by component, each a program of its own; together they need not be the first token's time.
      first: from uint8 pixels on the host to the first token.
      again: of a further question about the same images, where their prefixes are kept.
      token: of each further token of the answer.
      memory: most bytes that a device holds, by the compiled programs.
    """

    name: str
    parts: dict[str, float]
    first: float
    again: float
    token: float
    memory: int


def measure(
    config: ModelConfig, images: int, text: int, mesh: Mesh, *, dtype: Any, attention: str = "auto", rounds: int = 5
) -> Timing:
    """Times one question.

    Args:
      config: of the model; its context is made as long as the question.
      images: pictures that are asked about.
      text: tokens of the prompt.
      mesh: devices.
      dtype: of weights and arithmetic.
      attention: kernel, see `models.attention`.
      rounds: turns of each, after one in which it is compiled.
    """
    longest = length_bucket(images * config.tokens_per_image + text) + 2 * NEW_TOKENS
    decoder = dataclasses.replace(config.decoder, max_position_embeddings=max(4096, 2 * longest))
    config = dataclasses.replace(config, decoder=decoder)
    params = apart.as_loaded(init_params(config, mesh, dtype=dtype), mesh)
    engine = Engine(config, params, mesh, dtype=dtype, attention=attention, prefix_cache_bytes=2**40)
    at_once = min(images, engine.images.at_once)
    with jax.set_mesh(mesh):
        parts = _parts(LlavaMini(config, dtype, attention), params, images, at_once, text, rounds)
    one, many = _request(config, images, text, 1), _request(config, images, text, 1 + NEW_TOKENS)

    def forgotten() -> None:
        engine.images.prefixes.clear()
        engine.generate([one], ())

    kept = [lambda r=r: engine.generate([r], ()) for r in (one, many)]
    first, again, answer = _medians([forgotten, *kept], rounds)
    peak = rehearse(config, [many], mesh, dtype=dtype, attention=attention).peak
    return Timing(costs.label(config), parts, first, again, max(0.0, answer - again) / NEW_TOKENS, peak)


def _request(config: ModelConfig, images: int, text: int, new: int) -> Request:
    side = config.vision.image_size
    shape = (images, config.tiles, side, side, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ids = np.concatenate([np.full(images, IMAGE_TOKEN_ID), np.arange(text) % config.decoder.vocab_size]).astype(np.int32)
    return Request(ids, list(pixels), Sampling(new))


def _parts(model: LlavaMini, params: Any, images: int, at_once: int, text: int, rounds: int) -> dict[str, float]:
    """Seconds of each component at the sizes that inference gives it; those of images at `at_once` of them."""
    c, d = model.config, model.config.decoder
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, method: Callable[..., Any], *args: Any) -> Any:
        jitted = jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))
        calls[name] = lambda: jitted(params, *args)
        return calls[name]()

    side, words = c.vision.image_size, jnp.zeros((at_once, length_bucket(text), d.hidden_size), model.dtype)
    features = add("vision encoder", LlavaMini.vision_features, jnp.zeros((at_once, c.tiles, side, side, 3), jnp.uint8))
    whole = features[:, -1]
    grids = [whole] if c.resolution_ratio == 1 else [_stitched(model, features), whole]
    if c.compressor:
        grids.append(add("compressor", lambda m, x: m.compress(x)[0], grids[0]))
    used = grids if c.prefusion_layers or not c.compressor else grids[-1:]
    projected = add("projector", lambda m, *xs: jnp.concatenate([m.project(x) for x in xs], axis=1), *used)
    if c.prefusion_layers:
        prefix = add("pre-fusion, image", lambda m, x: _fuse_image(m, x), projected)
        add("pre-fusion, text", LlavaMini.fuse_text, words, prefix)
    length = length_bucket(images * c.tokens_per_image + text)
    x, last = jnp.zeros((1, length, d.hidden_size), model.dtype), jnp.full((1, 1), length - 1)
    hidden = add("decoder", lambda m, x, last: m.hidden(x, queries=last)[0], x, last)
    add("logits", LlavaMini.logits, hidden)
    of_images = {"vision encoder", "compressor", "projector", "pre-fusion, image", "pre-fusion, text"}
    seconds = dict(zip(calls, _medians(list(calls.values()), rounds)))
    return {name: s * (images / at_once if name in of_images else 1) for name, s in seconds.items()}


def _stitched(model: LlavaMini, features: jax.Array) -> jax.Array:
    return jax.jit(lambda x: model.apply({}, x, method="stitch"))(features[:, :-1])


def _fuse_image(model: LlavaMini, x: jax.Array) -> ImagePrefix:
    c = model.config
    return ImagePrefix(*prefusion.fuse_image(model.prefusion_layers, x, c.tokens_per_image, c.decoder, model.attention))


def _medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of each, which take turns, after one turn that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, of in zip(calls, seconds):
            start = time.perf_counter()
            jax.block_until_ready(call())
            of.append(time.perf_counter() - start)
    return [statistics.median(of[1:]) for of in seconds]

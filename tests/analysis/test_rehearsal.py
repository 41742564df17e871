"""What a rehearsal says of programs that were not run, against an engine that runs them."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.analysis.rehearsal import rehearse
from lmm_jax.config import IMAGE_TOKEN_ID, named_sizes
from lmm_jax.inference.engine import Engine, Request
from lmm_jax.inference.sampling import Sampling
from lmm_jax.models import apart
from lmm_jax.models.kv_cache import position_bytes
from lmm_jax.models.llava_mini import init_params
from lmm_jax.models.quantization import quantize_leaf
from lmm_jax.sharding import leaf_paths, make_mesh

CONFIG = named_sizes()["tiny"]
SIDE = CONFIG.vision.image_size


class Frames:
    """A video of black frames."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return (np.zeros((1, SIDE, SIDE, 3), np.uint8) for _ in range(self.count))


def requests(frames: int) -> list[Request]:
    """A question about a video, one about a picture, and one about nothing."""
    ids = np.arange(10, 30, dtype=np.int32)
    asked = np.where(np.arange(20) == 4, IMAGE_TOKEN_ID, ids)
    media = ([Frames(frames)], [np.zeros((1, SIDE, SIDE, 3), np.uint8)], [])
    return [Request(asked if m else ids, m, Sampling(4)) for m in media]


@pytest.mark.slow
def test_it_compiles_what_the_engine_compiles():
    mesh = make_mesh()
    found = rehearse(CONFIG, requests(70), mesh, dtype="float32")
    engine = Engine(CONFIG, init_params(CONFIG, mesh), mesh, dtype="float32", prefix_cache_bytes=0)
    owners = (engine, engine.images, engine.programs)
    jitted = {name: f for owner in owners for name, f in vars(owner).items() if isinstance(f, jax.stages.Wrapped)}
    for function in jitted.values():
        function.clear_cache()  # other engines may have used it
    engine.generate(requests(70), ())
    compiled = collections.Counter(p.name for p in found.programs)
    for name, function in jitted.items():
        assert compiled[name.strip("_")] == function._cache_size(), name


@pytest.mark.slow
def test_a_mesh_divides_the_bytes():
    one, eight = (rehearse(CONFIG, requests(1), make_mesh(spec), dtype="float32") for spec in (None, "fsdp=4,tensor=2"))
    assert [p.name for p in one.programs] == [p.name for p in eight.programs]
    params = init_params(CONFIG, make_mesh())
    size, loaded = (sum(x.nbytes for x in jax.tree.leaves(p)) for p in (params, apart.as_loaded(params, make_mesh())))
    assert one.parameters == loaded > size
    assert size / 8 <= eight.parameters < size / 7  # small ones are replicated


@pytest.mark.slow
def test_parameters_in_four_bits():
    found = rehearse(CONFIG, requests(1)[2:], make_mesh(), dtype="float32", quantize="int4")
    params = leaf_paths(init_params(CONFIG, make_mesh()))
    kept = jax.tree.leaves([quantize_leaf(path, leaf, "int4") for path, leaf in params.items()])
    assert found.parameters == sum(x.size * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize) for x in kept) // 8


@pytest.mark.slow
def test_memory_of_a_long_video():
    """Until the prompt is read, a frame leaves its vision token and room for its keys and values: no pixels, no features."""
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, max_position_embeddings=8192))
    short, long = (rehearse(config, requests(n)[:1], make_mesh(), dtype="float32") for n in (2000, 4000))
    before = [max(p.peak for p in r.programs if p.name in ("encode", "fuse", "put")) for r in (short, long)]
    positions, tokens = 4096 - 2048, 4096 - 2048  # as lengths are rounded up
    token = 4 * config.tokens_per_image * config.decoder.hidden_size
    assert before[1] - before[0] == positions * position_bytes(config.decoder, jnp.float32) + tokens * token
    assert next(p.runs for p in long.programs if p.name == "encode") == 4000 // 32
    assert short.parameters < before[0] < short.peak < long.peak


@pytest.mark.slow
def test_layers_apart_are_rehearsed_apart(monkeypatch):
    monkeypatch.setattr(apart, "LARGE", 0)
    found = rehearse(CONFIG, requests(1)[1:2], make_mesh(), dtype="float32")
    assert not any(" while(" in p.text for p in found.programs if p.name == "prefill")  # unrolled
    assert found.parameters == sum(4 * x.size for x in jax.tree.leaves(init_params(CONFIG, make_mesh())))

"""How the programs of inference are compiled."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lmm_jax.config import named_sizes
from lmm_jax.inference import compiling
from lmm_jax.models import clip_vit, llama
from lmm_jax.models.llava_mini import LlavaMini, abstract_params
from lmm_jax.sharding import make_mesh


@pytest.fixture
def options(monkeypatch):
    """What `jax.jit` was told of each program."""
    told = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **how: told.append(how["compiler_options"]) or jit(f, **how))
    return told


def test_a_processor_optimises_less_unless_told_otherwise(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert compiling.jit(lambda x: x + 1, make_mesh())(jnp.int32(1)) == 2
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    assert compiling.jit(lambda x: x + 1, make_mesh())(jnp.int32(1)) == 2
    assert options == [{"xla_backend_optimization_level": 1}, None]


def test_other_devices_are_left_alone(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    device = AbstractDevice("TPU v5e", num_cores=1, platform="tpu")
    compiling.jit(lambda x: x + 1, AbstractMesh((1,), ("fsdp",), (AxisType.Auto,), abstract_device=device))
    assert options == [None]


@pytest.mark.parametrize("module,layer", [(llama, "DecoderLayer"), (clip_vit, "EncoderLayer")])
def test_a_layer_of_a_scan_is_traced_once(module, layer, monkeypatch):
    config, calls = named_sizes()["tiny"], []
    call = getattr(module, layer).__call__
    monkeypatch.setattr(getattr(module, layer), "__call__", lambda self, *args: calls.append(self.name) or call(self, *args))
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        params = abstract_params(config, mesh, "float32")
        side = config.vision.image_size
        pixels = jax.ShapeDtypeStruct((1, config.tiles, side, side, 3), jnp.uint8)
        model = LlavaMini(config, jnp.dtype("float32"), "plain")
        jax.eval_shape(lambda p, x: model.apply({"params": p}, x, method="encode_image"), params, pixels)
    assert sorted(calls) == sorted(set(calls))
    assert calls


PICTURE = Path(__file__).parents[2] / "examples" / "shapes.png"
ASKING = """
import collections, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
import lmm_jax
lmm_jax.load(sys.argv[1]).ask("What is this?", images=[sys.argv[2]], max_new_tokens=4)
print(counts["compile_requests_use_cache"], counts["cache_hits"])
"""


@pytest.mark.slow
def test_the_next_process_compiles_nothing(tiny, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_PERSISTENT_CACHE")}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path)

    def asked_and_found() -> list[int]:
        command = [sys.executable, "-c", ASKING, str(tiny("tiny")), str(PICTURE)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    asked, found = asked_and_found()
    assert asked > found
    again, found = asked_and_found()
    assert again == found == asked

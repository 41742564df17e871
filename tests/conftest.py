"""Every test process sees 8 simulated devices and computes in float32."""

import contextlib
import io
import os
import signal

# compiling is most of the suite's time, and the models are tiny: spend little on optimising them
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# there is a test process for each core: what is split between threads takes longer in all
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
# without this, simulated devices meet at their collectives in different orders and wait for each other forever
FLAGS += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
# tests share what they compile, also with the next run
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
# what a shell starts in the background ignores Ctrl-C, and so would the processes that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from support import CASES, GOLDEN  # noqa: E402


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Golden case -> its model folder, made by the converter, with a tokenizer where the vocabulary has room for one."""
    from conversion.__main__ import main

    folders = {}

    def convert(case: str):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp(case) / "model"
            tokenizer = {"image_c1": "llama3_tokenizer"}.get(case, "vicuna_tokenizer")
            arguments = ["from-hf", str(GOLDEN / case / "hf"), str(folders[case])]
            with contextlib.redirect_stdout(io.StringIO()):
                assert main([*arguments, "--tokenizer", str(GOLDEN / "text" / tokenizer)]) == 0
        return folders[case]

    assert set(CASES) <= {p.name for p in GOLDEN.iterdir()}
    return convert


@pytest.fixture
def assistant(converted):
    """Golden case, settings of `lmm_jax.load` -> Assistant."""
    import lmm_jax

    return lambda case, **settings: lmm_jax.load(converted(case), **settings)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Named test size -> a model folder with random weights and the Vicuna test tokenizer."""
    from lmm_jax.checkpoint import unstack, write_model
    from lmm_jax.config import named_sizes
    from lmm_jax.models.llava_mini import init_params
    from lmm_jax.sharding import make_mesh

    folders = {}

    def make(name: str):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name) / "model"
            config = named_sizes()[name]
            tokenizer = sorted((GOLDEN / "text" / "vicuna_tokenizer").iterdir())
            write_model(folder, config, unstack(init_params(config, make_mesh(), seed=1)), files=tokenizer)
            folders[name] = folder
        return folders[name]

    return make

"""``python -m train compile``: what it prints, keeps and refuses; the compiler itself where libtpu is installed."""

import importlib.util
import json
import os

import jax
import pytest

from lmm_jax.analysis import rehearsal
from train import compile
from train.__main__ import main

CONFIG = """
from lmm_jax.config import named_sizes
from train.config import *

def get_config():
    frozen = "vision_tower/.*|compressor/pos_embed"
    groups = (GroupConfig(frozen), GroupConfig(f"(?!{frozen}).*", 1e-3))
    return TrainConfig(
        "run",
        start=StartConfig(folder="not/there", size="tiny"),
        data=DataConfig(batch_size=32, max_length=128, buckets=()),
        optimizer=OptimizerConfig(groups),
        compute=ComputeConfig(dtype="bfloat16"),
    )
"""
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'lmm-jax[tpu-aot]'")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what the command sets stays here
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    return str(file)


def test_estimates(config, tmp_path, capsys):
    assert main(["compile", "--topology", "h100-8", "--json", str(tmp_path / "figures.json"), config]) == 0
    said = capsys.readouterr().out
    assert "8 x NVIDIA H100 80GB HBM3" in said and "estimated, not compiled" in said and "It fits." in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["fits"] and not figures["compiled"]
    assert said.index(f"| {figures['mesh']} |") < said.index("tensor=2")  # the fastest of all, in the first line
    assert figures["batch"] == {"images": 1, "length": 128, "fused": 63, "targets": 64}
    memory = figures["memory"]
    parts = ("trained", "frozen", "optimizer", "batch", "activations", "temporaries")
    assert memory["peak"] == sum(memory[part] for part in parts)


def test_a_mesh_may_be_named(config, capsys):
    assert main(["compile", "--topology", "h100-8", "--images", "0", config, "--compute.mesh", "fsdp=4,tensor=2"]) == 0
    said = capsys.readouterr().out
    assert said.count("fsdp=4,tensor=2") == 2 and "| all-reduce | 2 |" in said and "0 pictures each" in said


def test_a_mesh_of_other_devices(config, capsys):
    assert main(["compile", "--topology", "h100-8", config, "--compute.mesh", "fsdp=4"]) == 2
    assert "mesh 'fsdp=4' is not one of 8 devices" in capsys.readouterr().err


def test_what_does_not_fit_is_told(config, capsys):
    wanted = ["--data.batch-size", "8388608", "--data.max-length", "4096"]
    assert main(["compile", "--topology", "h100-8", config, *wanted]) == 1
    assert "It does not fit: more devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "compile needs --topology"),
        (["--topology", "v5e-7"], "there is no topology 'v5e-7'"),
        (["--topology", "h100-8", "--images", "-1"], "compile takes numbers from 0 on"),
        (["--topology", "h100-8", "--serve"], "h100-8 cannot be compiled for here, only TPUs can"),
        (["--topology", "h100-8", "--quantize", "int3"], "invalid choice: 'int3'"),
        (["--topology", "h100-8", "--quantize", "int8"], "--rows and --quantize with --serve"),
        (["--topology", "v5e-4", "--serve", "--images", "1"], "--images, --search and --full without"),
        (["--topology", "v5e-4", "--serve", "--search"], "--images, --search and --full without"),
        (["--topology", "h100-8", "--length", "129"], "data.max_length is 128"),
        (["--topology", "h100-8", "--json", "no/such/folder.json"], "there is no folder no/such"),
    ],
)
def test_bad_input(config, capsys, words, message):
    assert main(["compile", *words, config]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_size(config, capsys):
    assert main(["compile", "--topology", "h100-8", config, "--start.size", "huge"]) == 2
    assert "start.size 'huge' is no size with a name: choose one of" in capsys.readouterr().err


def test_without_libtpu(config, capsys, monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("Unable to find libtpu.so")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    assert main(["compile", "--topology", "v5e-4", config]) == 2
    assert "pip install 'lmm-jax[tpu-aot]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--full"], ["--search"]], ids=str)
def test_the_next_smaller_one_is_tried(config, capsys, monkeypatch, words):
    """With a compiler that finds no room, in place of libtpu's."""
    tried = []

    def compile_step(setup, shape, options):
        tried.append((dict(setup.mesh.shape), setup.config.compute.remat, setup.config.optimizer.accumulation))
        assert options == ({} if "--full" in words else compile.hardware.QUICK)
        return compile.Compiled(15.75 * 2**30 + 1, 0.0, [], 1.0, False)

    monkeypatch.setattr(compile, "compile_step", compile_step)
    monkeypatch.setattr(compile.hardware, "described", lambda shape: jax.devices())
    assert main(["compile", "--topology", "v5e-8", *words, config]) == 1
    said = capsys.readouterr().out
    assert (
        len({str(one) for one in tried}) == 3
        and said.count("does not fit, attempt") == 3
        and "It does not fit: more devices" in said
    )


@pytest.mark.parametrize(
    "message,expected",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm.", 17.25 * 2**30),
        ("RESOURCE_EXHAUSTED: … memory required for HLO temporaries (25.23G) exceeds available HBM (15.75G).", 25.23 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.", None),
    ],
)
def test_what_the_compiler_says_of_memory(message, expected):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(rehearsal.TooLargeError) as error:
        rehearsal.compile_for(Lowered())
    assert error.value.needed == expected


@needs_libtpu
@pytest.mark.slow
def test_compiled(config, tmp_path, capsys):
    assert main(["compile", "--topology", "v5e-4", "--json", str(tmp_path / "figures.json"), config]) == 0
    assert "compiled in" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    memory = figures["memory"]
    held = sum(memory[part] for part in ("trained", "frozen", "optimizer", "batch"))
    assert held < memory["peak"] < memory["of"]
    assert "all-reduce" in {c["kind"] for c in figures["collectives"]}


@needs_libtpu
@pytest.mark.slow
def test_answering(config, capsys):
    assert main(["compile", "--topology", "v5e-4", "--serve", "--rows", "2", "--length", "64", config]) == 0
    said = capsys.readouterr().out
    assert "data=1,tensor=4" in said and "| prefill |" in said and "It fits." in said

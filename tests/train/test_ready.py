"""Settings for pods and clusters: those that are shipped, how the command line takes them, and what was found of them.

Where shardings or figures change on purpose: `LMM_WRITE_SNAPSHOTS=1 pytest tests/train/test_ready.py` writes the shardings
anew, `python benchmarks/scale.py` the figures.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
from pathlib import Path

import jax
import pytest

from lmm_jax import sharding
from lmm_jax.config import REMAT
from lmm_jax.errors import UserError
from train import compile, hardware, meshes, ready, roofline
from train.__main__ import main
from train.config import TrainConfig
from train.setup import plan
from train.start import planned_config

SHARDINGS = Path(__file__).with_name("shardings.json")
FOUND = json.loads((Path(ready.__file__).parents[1] / "benchmarks" / "scale.json").read_text())
CONFIGS = Path(ready.__file__).parents[1] / "configs"
SETTINGS = json.loads((CONFIGS / ready.FILE).read_text())
EACH = [(run, topology) for run, known in SETTINGS.items() for topology in known]


def config_of(run: str) -> TrainConfig:
    return importlib.import_module(f"configs.{run}").get_config()


def test_published_runs_are_there():
    published = {f.stem for f in CONFIGS.glob("*.py") if not f.stem.startswith(("demo", "common", "__"))}
    assert set(SETTINGS) == published
    fits = {f"{chip}-64" for chip in ("v5e", "v6e", "a100", "h100")} | {"v5p-128", "v5e-256", "v6e-256", "a100-8", "h100-8"}
    assert all(set(known) == fits for known in SETTINGS.values())


@pytest.mark.parametrize("run,topology", EACH, ids="-".join)
def test_settings_suit_the_devices(run, topology):
    _, devices, _ = hardware.parse(topology)
    config = ready.on(topology, config_of(run), CONFIGS / f"{run}.py")
    sizes = sharding.mesh_sizes(config.compute.mesh)
    assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == devices
    assert config.data.batch_size % (sizes["data"] * sizes["fsdp"] * config.optimizer.accumulation) == 0
    assert config.compute.remat in REMAT
    same = ready.computed(config, mesh="", remat="full", accumulation=1)
    assert same == ready.computed(config_of(run), mesh="", remat="full", accumulation=1)


def test_on_the_command_line(capsys):
    file = str(CONFIGS / "stage2_llama_3_1_8b.py")
    mesh = SETTINGS["stage2_llama_3_1_8b"]["h100-8"]["mesh"]
    assert main(["compile", "--topology", "h100-8", "--on", "h100-8", file]) == 0
    assert f"{mesh}, remat" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--on", "h100-8", file, "--help"])
    assert mesh in capsys.readouterr().out


def test_what_is_not_known(tmp_path):
    config, file = config_of("stage2_vicuna_7b"), CONFIGS / "stage2_vicuna_7b.py"
    with pytest.raises(UserError, match="no settings for stage2_vicuna_7b on 'v5e-4': choose one of .*v5e-64"):
        ready.on("v5e-4", config, file)
    with pytest.raises(UserError, match="no settings for .*mine.py"):
        ready.on("v5e-64", config, tmp_path / "mine.py")
    for text, message in (("{", "is not JSON"), ('{"mine": {"v5e-64": {"meshes": ""}}}', "a setting has mesh, remat")):
        (tmp_path / ready.FILE).write_text(text)
        with pytest.raises(UserError, match=message):
            ready.on("v5e-64", config, tmp_path / "mine.py")


def planned(run, topology):
    """The setup of a run as it is computed there, and what it keeps."""
    chip, _, _ = hardware.parse(topology)
    config = ready.on(topology, config_of(run), CONFIGS / f"{run}.py")
    setup = plan(config, planned_config(config.start), meshes.abstract_mesh(config.compute.mesh, chip))
    return setup, roofline.planned_state(setup)


@pytest.mark.parametrize("run", SETTINGS)
def test_shardings_are_those_that_were_kept(run):
    _, state = planned(run, "v5e-64")
    described = {
        f"{kind} {path}": f"{leaf.dtype}{list(leaf.shape)} {leaf.sharding.spec}"
        for kind, leaves in (("trained", state.trained), ("frozen", state.frozen))
        for path, leaf in leaves.items()
    }
    described["optimizer"] = f"{sum(x.size for x in jax.tree.leaves(state.optimizer))} numbers"
    kept = json.loads(SHARDINGS.read_text()) if SHARDINGS.exists() else {}
    if os.environ.get("LMM_WRITE_SNAPSHOTS"):
        SHARDINGS.write_text(json.dumps(dict(sorted((kept | {run: described}).items())), indent=1) + "\n")
    else:
        assert described == kept[run]


@pytest.mark.parametrize("run,topology", EACH, ids="-".join)
def test_memory_is_what_was_found(run, topology):
    setup, state = planned(run, topology)
    shape = roofline.bucket(setup, 1, setup.config.data.max_length)
    held = dataclasses.asdict(roofline.held(state, roofline.abstract_batch(setup, shape)))
    compiled = FOUND["compiled"].get(run, {}).get(topology)
    if compiled:
        assert {kind: compiled["memory"][kind] for kind in held} == held
        assert compiled["fits"] and compiled["memory"]["peak"] <= compiled["memory"]["of"]
    else:
        assert FOUND["estimated"][run][topology]["held"] == held


COMPILED = [run for run, found in FOUND["compiled"].items() if "v5e-64" in found]


@pytest.mark.parametrize(
    "run", [pytest.param(r, marks=[] if r.startswith("stage1_v") else pytest.mark.slow) for r in COMPILED]
)
def test_work_is_what_was_found(run):
    """FLOPs and what is kept for the backward pass, of the settings for v5e-64."""
    compiled = FOUND["compiled"][run]["v5e-64"]
    config = ready.on("v5e-64", config_of(run), CONFIGS / f"{run}.py")
    chip, _, _ = hardware.parse("v5e-64")
    sizes, remats = planned_config(config.start), (compiled["remat"],)
    once = ready.computed(config, accumulation=1)
    shape, works = compile.planned(once, sizes, chip, 1, config.data.max_length, remats)
    work = works[compiled["remat"]].in_parts(compiled["accumulation"])
    assert dataclasses.asdict(shape) == compiled["batch"]
    assert compiled["flops"] == {"model": work.model_flops, "executed": work.executed_flops}
    sizes = sharding.mesh_sizes(compiled["mesh"])
    assert compiled["memory"]["activations"] == work.kept_bytes / sizes["data"] / sizes["fsdp"]


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'lmm-jax[tpu-aot]'")
@pytest.mark.slow
def test_the_compiled_step_is_what_was_found(tmp_path):
    run, file = "stage1_vicuna_7b", tmp_path / "figures.json"
    words = ["--topology", "v5e-64", "--on", "v5e-64", "--json", str(file)]
    assert main(["compile", *words, str(CONFIGS / f"{run}.py")]) == 0
    got, kept = json.loads(file.read_text()), FOUND["compiled"][run]["v5e-64"]
    assert got["memory"]["peak"] == pytest.approx(kept["memory"]["peak"], rel=0.02)
    assert {c["kind"] for c in got["collectives"]} == {c["kind"] for c in kept["collectives"]}
    received = [sum(c["received"] for c in found["collectives"]) for found in (got, kept)]
    assert received[0] == pytest.approx(received[1], rel=0.02)

"""Settings for pods and clusters: those that are shipped, and how the command line takes them."""

import importlib
import json
from pathlib import Path

import pytest

from lmm_jax import sharding
from lmm_jax.config import REMAT
from lmm_jax.errors import UserError
from train import hardware, ready
from train.__main__ import main
from train.config import TrainConfig

CONFIGS = Path(ready.__file__).parents[1] / "configs"
SETTINGS = json.loads((CONFIGS / ready.FILE).read_text())
EACH = [(run, topology) for run, known in SETTINGS.items() for topology in known]


def config_of(run: str) -> TrainConfig:
    return importlib.import_module(f"configs.{run}").get_config()


def test_published_runs_are_there():
    published = {f.stem for f in CONFIGS.glob("*.py") if not f.stem.startswith(("demo", "common", "__"))}
    assert set(SETTINGS) == published


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

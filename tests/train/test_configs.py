"""Every configuration of the published sizes builds, and makes the model it says; nothing is allocated."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import yaml

from lmm_jax import checkpoint, sharding
from lmm_jax.config import named_sizes
from lmm_jax.models.llava_mini import abstract_params
from train.config import SourceConfig
from train.lora import add_lora
from train.optimizer import assign_groups
from train.records import read_mixture
from train.start import model_config

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = named_sizes()


def composed(size):
    """What `python -m conversion from-hf --llm` makes of a language model."""
    return dataclasses.replace(SIZES[size], compressor=None, prefusion_layers=0, image_aspect_ratio="square")


VICUNA, LLAMA = composed("llava-v1.5-7b"), composed("llava-mini-llama-3.1-8b")
TRAINED = {  # configuration -> the model it starts from, the one it trains, and the share of it that learns
    "stage1_vicuna_7b": (VICUNA, VICUNA, (0.002, 0.004)),
    "stage1_llama_3_1_8b": (LLAMA, LLAMA, (0.002, 0.004)),
    "stage2_vicuna_7b": (VICUNA, SIZES["llava-mini-vicuna-7b"], (0.95, 0.97)),
    "stage2_llama_3_1_8b": (LLAMA, SIZES["llava-mini-llama-3.1-8b"], (0.95, 0.98)),
    "stage2_hd_vicuna_7b": (VICUNA, SIZES["llava-mini-hd-vicuna-7b"], (0.95, 0.97)),
    "stage2_lora_vicuna_7b": (VICUNA, SIZES["llava-mini-vicuna-7b"], (0.14, 0.17)),
    "llava_v1_5_stage1_vicuna_7b": (VICUNA, VICUNA, (0.002, 0.004)),
    "llava_v1_5_vicuna_7b": (VICUNA, SIZES["llava-v1.5-7b"], (0.95, 0.97)),
}


def load(name):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


def test_all_are_tested():
    files = {f.stem for f in CONFIGS.glob("*.py") if not f.stem.startswith(("demo", "common", "__init__"))}
    assert files == set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_the_model_and_its_groups(name, monkeypatch):
    start, size, (least, most) = TRAINED[name]
    config = load(name)
    monkeypatch.setattr(checkpoint, "read_config", lambda folder: start)
    assert model_config(config.start) == size
    tree = abstract_params(size, sharding.make_mesh("fsdp=8"))
    leaves = sharding.leaf_paths(add_lora(tree, config.lora) if config.lora.rank else tree)
    groups = assign_groups(leaves, config.optimizer.groups)
    assert groups.keys() == leaves.keys()
    trained = {path for path, group in groups.items() if group.learning_rate is not None}
    assert not any(path.startswith("vision_tower") or path == "compressor/pos_embed" for path in trained)
    share = sum(leaves[path].size for path in trained) / sum(x.size for x in leaves.values())
    assert least < share < most
    assert all(group.weight_decay == 0 for group in groups.values())


# batch, epochs, positions, warm-up, clipping; learning rates of projector, decoder, what is added (None: frozen, or absent)
PUBLISHED = {
    "stage1_vicuna_7b": (256, 1, 4096, 0.03, 0.5, (1e-3, None, None)),
    "stage1_llama_3_1_8b": (256, 1, 4096, 0.03, 0.5, (1e-3, None, None)),
    "stage2_vicuna_7b": (256, 2, 4096, 0.03, 0.5, (1e-5, 1e-4, 1e-4)),
    "stage2_llama_3_1_8b": (256, 2, 4096, 0.03, 0.5, (1e-5, 1e-4, 1e-4)),
    "stage2_hd_vicuna_7b": (256, 2, 4096, 0.03, 0.5, (1e-5, 1e-4, 1e-4)),
    "llava_v1_5_stage1_vicuna_7b": (256, 1, 2048, 0.03, 1.0, (1e-3, None, None)),
    "llava_v1_5_vicuna_7b": (128, 1, 2048, 0.03, 1.0, (2e-5, 2e-5, None)),
}
SOME = ("mm_projector/linear_1/kernel", "layers/mlp/up_proj/kernel", "prefusion_layers/self_attn/q_proj/kernel")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    config = load(name)
    d, o = config.data, config.optimizer
    rates = tuple(next((g.learning_rate for g in o.groups if re.fullmatch(g.pattern, path)), None) for path in SOME)
    assert (d.batch_size, d.epochs, d.max_length, o.warmup, o.clip, rates) == PUBLISHED[name]
    assert (o.method, o.final, o.b1, o.b2, o.eps) == ("adamw", 0.0, 0.9, 0.999, 1e-8)
    assert d.template == ("plain" if "stage1" in name else "")


@pytest.mark.parametrize("name", TRAINED)
def test_how_it_is_run(name):
    config = load(name)
    docstring = (CONFIGS / f"{name}.py").read_text().splitlines()[0]
    assert docstring == f'"""python -m train configs/{name}.py'
    assert config.folder == f"runs/{name}" and (CONFIGS.parent / config.data.mixture).is_file()
    before = re.fullmatch(r"runs/(\w+)/model", config.start.folder)
    assert before is None if "stage1" in name else "stage1" in before[1] and before[1] in TRAINED
    assert config.compute.mesh == "" and config.compute.trained_dtype == "float32"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("mixtures/*.yaml")), ids=lambda f: f.stem)
def test_mixtures(file):
    sources = read_mixture(file)
    assert len(sources) == len(yaml.safe_load(file.read_text()))
    assert all(isinstance(s, SourceConfig) and s.sampling == "all" for s in sources)
    data = (CONFIGS.parent / "data").resolve()
    assert all(Path(s.file).resolve().is_relative_to(data) and Path(s.media).resolve().is_relative_to(data) for s in sources)

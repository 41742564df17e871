"""The rooms: imports run one way, and each library is used where it belongs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what each room may import; a room may always import itself
ROOMS = {
    "lmm_jax.errors": set(),
    "lmm_jax.cluster": {"lmm_jax.errors"},
    "lmm_jax.config": {"lmm_jax.errors"},
    "lmm_jax.sharding": {"lmm_jax.errors", "lmm_jax.config"},
    "lmm_jax.storage": {"lmm_jax.errors"},
    "lmm_jax.data": {"lmm_jax.errors", "lmm_jax.config", "lmm_jax.storage"},
    "lmm_jax.models": {"lmm_jax.errors", "lmm_jax.config", "lmm_jax.sharding", "lmm_jax.data"},
    "lmm_jax.checkpoint": {"lmm_jax.errors", "lmm_jax.config", "lmm_jax.sharding", "lmm_jax.storage"},
    "lmm_jax.inference": {
        "lmm_jax.errors",
        "lmm_jax.config",
        "lmm_jax.sharding",
        "lmm_jax.data",
        "lmm_jax.models",
        "lmm_jax.checkpoint",
        "lmm_jax.storage",
    },
    "lmm_jax.evaluation": {
        "lmm_jax.errors",
        "lmm_jax.cluster",
        "lmm_jax.config",
        "lmm_jax.sharding",
        "lmm_jax.data",
        "lmm_jax.checkpoint",
        "lmm_jax.inference",
        "lmm_jax.demo",
    },
    "lmm_jax.analysis": {
        "lmm_jax.errors",
        "lmm_jax.storage",
        "lmm_jax.config",
        "lmm_jax.sharding",
        "lmm_jax.data",
        "lmm_jax.models",
        "lmm_jax.checkpoint",
        "lmm_jax.inference",
        "lmm_jax.demo",
    },
    "lmm_jax.serve": {
        "lmm_jax.errors",
        "lmm_jax.config",
        "lmm_jax.data",
        "lmm_jax.inference",
        "lmm_jax.analysis",
        "lmm_jax.demo",
    },
    "lmm_jax.cli": {
        "lmm_jax",
        "lmm_jax.storage",
        "lmm_jax.errors",
        "lmm_jax.config",
        "lmm_jax.data",
        "lmm_jax.inference",
        "lmm_jax.evaluation",
        "lmm_jax.analysis",
        "lmm_jax.serve",
    },
    "lmm_jax.__main__": {"lmm_jax.cli"},
    "lmm_jax": {"lmm_jax.inference", "lmm_jax.demo"},
    "lmm_jax.demo": {"lmm_jax.errors", "lmm_jax.config", "lmm_jax.data"},
    "lmm_jax.demo.__main__": {"lmm_jax.demo", "lmm_jax.errors", "lmm_jax.cli"},
    "train": {
        "lmm_jax.analysis",
        "lmm_jax.errors",
        "lmm_jax.cluster",
        "lmm_jax.config",
        "lmm_jax.sharding",
        "lmm_jax.data",
        "lmm_jax.models",
        "lmm_jax.checkpoint",
        "lmm_jax.inference",
        "lmm_jax.storage",
        "lmm_jax.cli",
    },
    "conversion": {
        "lmm_jax.errors",
        "lmm_jax.storage",
        "lmm_jax.config",
        "lmm_jax.checkpoint",
        "lmm_jax.models",
        "lmm_jax.data",
        "lmm_jax.cli",
    },
}
FILES = sorted(p for folder in ("lmm_jax", "conversion", "train") for p in (ROOT / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    module = re.sub("checkpoint_(io|mesh)", "checkpoint", module)
    return max((r for r in ROOMS if module == r or module.startswith(r + ".")), key=len)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {s if is_module(s) else node.module for s in submodules}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_run_one_way(file):
    here = room(module_name(file))
    ours = {room(name) for name in imports(file) if name.split(".")[0] in ("lmm_jax", "conversion", "train", "configs")}
    assert ours - {here} <= ROOMS[here]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_libraries_stay_in_their_rooms(file):
    libraries, name = {n.split(".")[0] for n in imports(file)}, module_name(file)
    assert "torch" not in libraries
    assert "jax" not in libraries or not name.startswith("lmm_jax.data")
    assert not any(n.startswith("flax.linen") for n in imports(file)) or name.startswith("lmm_jax.models")
    assert "transformers" not in libraries or name == "lmm_jax.data.tokenizer_files"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 400

"""Small runs: their data, their configuration, `python -m train` as a process of its own, and what it left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from data.test_video import make_clip
from PIL import Image
from safetensors.numpy import load_file, save_file
from support import GOLDEN

from conversion.from_hf import Options, compose
from lmm_jax.checkpoint import leaf_shapes, read_leaf, unstack, write_model
from lmm_jax.config import CompressorConfig, DecoderConfig, ModelConfig, VisionConfig
from lmm_jax.models.llava_mini import init_params
from lmm_jax.sharding import make_mesh
from train.config import (
    ComputeConfig,
    DataConfig,
    GroupConfig,
    HeldOutConfig,
    OptimizerConfig,
    RecordConfig,
    SourceConfig,
    StartConfig,
    TrainConfig,
)

ROOT = Path(__file__).parents[2]
TOKENIZER = GOLDEN / "text" / "vicuna_tokenizer"
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}

_VISION = VisionConfig(32, 48, num_layers=2, num_heads=4, patch_size=14, image_size=28, name="")
_DECODER = DecoderConfig(512, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_position_embeddings=512)
# Two layers, so that a scan has one step and becomes no loop: on simulated devices the collectives of a loop and those
# around it have no common order, and may wait for each other for ever.
MINI = ModelConfig(_VISION, _DECODER, CompressorConfig(1), prefusion_layers=2)
V1_5 = dataclasses.replace(MINI, compressor=None, prefusion_layers=0)

PROJECTOR = r"mm_projector/.*"
STAGE_1 = (GroupConfig(PROJECTOR, 1e-2), GroupConfig(r"(?!mm_projector/).*"))
STAGE_2 = (
    GroupConfig(PROJECTOR, 1e-3),
    GroupConfig(r"(embed_tokens|layers|norm|lm_head|prefusion_layers)/.*|compressor/(?!pos_embed).*", 3e-3),
    GroupConfig(r"vision_tower/.*|compressor/pos_embed"),
)


def write_data(folder: Path, pictures: int = 20, clips: int = 3, texts: int = 6) -> Path:
    """Coloured pictures, clips and text-only records -> their file."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(pictures):
        name = list(COLOURS)[i % len(COLOURS)]
        Image.new("RGB", (30 + i, 40), COLOURS[name]).save(folder / f"{i}.png")
        records.append({"id": i, "image": f"{i}.png", "conversations": turns("<image>\nWhich colour?", name)})
    for i in range(clips):
        make_clip(folder / f"{i}.mp4", frames=4 + i)
        records.append({"id": f"c{i}", "video": f"{i}.mp4", "conversations": turns("<video>\nWhat happens?", "it counts")})
    records += [{"id": f"t{i}", "conversations": turns(f"Say {i}.", str(i))} for i in range(texts)]
    return write_records(folder / "records.json", records)


def compose_start(folder: Path) -> Path:
    """The start of stage 1, a model folder: the golden LLM in float16, the golden CLIP in float32, a random projector."""
    hf, llm = GOLDEN / "llava_v1_5" / "hf", folder / "llm"
    llm.mkdir(parents=True)
    tensors = load_file(hf / "model.safetensors")
    text = {n: t.astype(np.float16) for n, t in tensors.items() if "mm_projector" not in n and "vision_tower" not in n}
    save_file(text, llm / "model.safetensors")
    config = json.loads((hf / "config.json").read_text()) | {"model_type": "llama"}
    (llm / "config.json").write_text(json.dumps(config))
    options = Options(tokenizer=str(TOKENIZER), report=lambda _: None)
    compose(str(llm), str(hf.parent / "clip"), str(folder / "model"), options)
    return folder / "model"


def write_start(folder: Path) -> Path:
    """A small LLaVA-v1.5 with random weights, a model folder."""
    weights = unstack(init_params(V1_5, make_mesh(), seed=1))
    write_model(folder, V1_5, weights, files=sorted(TOKENIZER.iterdir()))
    return folder


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_records(file: Path, records: list) -> Path:
    file.write_text(json.dumps(records))
    return file


def small(folder: Path, records: Path, *, max_steps: int | None = None, **changes: dict) -> TrainConfig:
    """A run of a small model from scratch; `changes` of its parts, as ``record={"keep": 1}``."""
    sources = (SourceConfig(str(records)),)
    parts = {
        "start": StartConfig(scratch=MINI, tokenizer=str(TOKENIZER)),
        "data": DataConfig(sources=sources, batch_size=8, max_length=128, buckets=(), video_frames=2, threads=2, prefetch=2),
        "optimizer": OptimizerConfig(groups=STAGE_2, warmup=0.0),
        "compute": ComputeConfig(mesh="data=1", remat="none"),
        "held_out": HeldOutConfig(every=0, batches=2, answers=2),
        "record": RecordConfig(checkpoint_steps=2, log_steps=1),
    }
    made = {name: dataclasses.replace(part, **changes.pop(name, {})) for name, part in parts.items()}
    assert not changes, changes
    return TrainConfig(str(folder), max_steps=max_steps, **made)


def projector_only(folder: Path, records: Path, model: Path, *, max_steps: int | None = None, **changes: dict) -> TrainConfig:
    """A stage 1 from a model folder, on rows of captions; it compiles fast."""
    parts = {
        "start": {"scratch": None, "tokenizer": "", "folder": str(model)},
        "optimizer": {"groups": STAGE_1},
        "data": {"template": "plain", "max_length": 32},
    }
    parts |= {name: parts.get(name, {}) | change for name, change in changes.items()}
    return small(folder, records, max_steps=max_steps, **parts)


def write_config(config: TrainConfig) -> Path:
    """A configuration as a file for the command line, beside the run's folder."""
    file = Path(f"{config.folder}.py")
    imports = "from lmm_jax.config import *\nfrom train.config import *\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{imports}\n\ndef get_config():\n    return {config!r}\n")
    return file


def launch(config: TrainConfig, *, devices: int = 1, **environment: str) -> subprocess.Popen:
    """``python -m train`` with a configuration, as a process of its own; see `log` for what it says."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    command = [sys.executable, "-m", "train", str(write_config(config))]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)} | environment
    with log_file(config, environment).open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def launch_all(config: TrainConfig, processes: int, devices: int) -> list[subprocess.Popen]:
    """The same as so many processes of one run, each with so many devices; `log` takes a process's number."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"LMM_COORDINATOR": f"localhost:{port}", "LMM_PROCESSES": str(processes)}
    return [launch(config, devices=devices, **shared, LMM_PROCESS=str(i)) for i in range(processes)]


def wait_all(config: TrainConfig, processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Their exit statuses, and what all have said."""
    statuses = [wait(process) for process in processes]
    return statuses, "\n".join(log(config, i) for i in range(len(processes)))


def log_file(config: TrainConfig, environment: Mapping[str, str]) -> Path:
    return Path(f"{config.folder}.{environment.get('LMM_PROCESS', '0')}.log")


def log(config: TrainConfig, process: int = 0) -> str:
    """What the last start of a run has said."""
    return log_file(config, {"LMM_PROCESS": str(process)}).read_text("utf-8")


def wait(process: subprocess.Popen, timeout: float = 300) -> int:
    """Its exit status; it is killed when it takes too long."""
    try:
        return process.wait(timeout)
    finally:
        process.kill()


def until(holds: Callable[[], Any], process: subprocess.Popen, timeout: float = 300) -> None:
    """Waits for something that a running process is to bring about."""
    end = time.monotonic() + timeout
    while not holds():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"it did not happen; exit status {process.poll()}")
        time.sleep(0.005)


def lines(folder: Path | str) -> list[dict[str, Any]]:
    """What a run wrote down, up to the last whole line of one that is still writing."""
    file = Path(folder) / "metrics.jsonl"
    text = file.read_text("utf-8") if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def figures(folder: Path | str, name: str = "loss") -> dict[int, Any]:
    """A figure by step; of steps that were done again the last one counts."""
    return {entry["step"]: entry[name] for entry in lines(folder) if name in entry}


def saved(folder: Path | str) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(p.name) for p in Path(folder, "checkpoints").glob("*") if p.name.isdigit())


def leaves(folder: Path | str) -> dict[str, np.ndarray]:
    """Every leaf of a model folder."""
    return {name: read_leaf(folder, name) for name in leaf_shapes(folder)}


def assert_same_model(a: Path | str, b: Path | str) -> None:
    """To the bit."""
    left, right = leaves(a), leaves(b)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []
    assert (Path(a) / "config.json").read_bytes() == (Path(b) / "config.json").read_bytes()

"""``python -m train compile CONFIG --topology v5e-64``: what a run would take on devices that are not here.

The step that `python -m train` would run is compiled by libtpu's own compiler, which needs no TPU. For GPUs, and for the
meshes that are not compiled, the estimates of `train.meshes` stand alone, and say so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax import sharding
from lmm_jax.analysis import program
from lmm_jax.analysis.program import Collective
from lmm_jax.analysis.rehearsal import TooLargeError, beside_arguments, compile_for, rehearse
from lmm_jax.config import IMAGE_TOKEN_ID, ModelConfig
from lmm_jax.errors import UserError
from lmm_jax.inference.engine import Request
from lmm_jax.inference.sampling import Sampling
from train import hardware, meshes, roofline, xla
from train.config import TrainConfig, to_json
from train.hardware import Chip
from train.meshes import Candidate
from train.plan import Bucket
from train.ready import computed
from train.roofline import Work
from train.setup import Setup, plan
from train.start import planned_config

SHOWN = 6  # meshes in the table
_TRACED: dict[str, tuple[Bucket, Work]] = {}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step; bytes are those of one device.

    Attributes:
      peak: all that is alive at once at most; where it does not fit, what it would be.
      temporaries: of it, what the step makes and drops.
      collectives: what is received.
      seconds: that compiling took.
      fits: whether the compiler found room.
    """

    peak: float
    temporaries: float
    collectives: list[Collective]
    seconds: float
    fits: bool


def run(
    config: TrainConfig,
    topology: str,
    *,
    images: int = 1,
    length: int | None = None,
    search: bool = False,
    full: bool = False,
    tries: int = 3,
) -> dict[str, Any]:
    """Compiles the step as it is fastest among what fits, prints what it takes, and returns the figures.

    Args:
      config: of the run; where it names no mesh, one is chosen.
      topology: see `hardware.parse`.
      images: pictures of each row, 0 for text; frames where rows are videos.
      length: decoder positions of each row; None is the longest that the run allows.
      search: whether to choose remat and accumulation as well.
      full: with all of the compiler's effort, as the run will be: several times slower.
      tries: candidates that are compiled at most, until one fits.

    Raises:
      UserError: an unknown topology, no libtpu; see `meshes.candidates`.
    """
    chip, devices, shape_name = hardware.parse(topology)
    sizes = planned_config(config.start)
    remats = meshes.searched(config)["remat"] if search else (config.compute.remat,)
    shape, works = planned(config, sizes, chip, images, length or config.data.max_length, remats)
    parts = meshes.searched(config)["accumulation"] if search else ()
    found = meshes.candidates(config, sizes, chip, devices, shape, works, parts)
    print(_head(config, topology, chip, devices, shape), end="\n\n")
    print(_mesh_table(found), flush=True)
    compiled, chosen = None, found[0]
    left = found if shape_name else []
    for attempt in range(tries):
        if not left:
            break
        chosen = left[0]
        mesh = sharding.make_mesh(chosen.mesh, hardware.described(shape_name))
        setup = plan(computed(config, remat=chosen.remat, accumulation=chosen.accumulation), sizes, mesh)
        setup = dataclasses.replace(setup, options=xla.known(setup.options, config.compute.xla_flags, mesh))
        compiled = compile_step(setup, shape, {} if full else hardware.QUICK)
        if compiled.fits:
            break
        said = f"{_how(chosen)} does not fit, attempt {attempt + 1} of {tries}"
        needs = f": it takes {compiled.peak / 1e9:.1f} GB or more" if math.isfinite(compiled.peak) else ""
        print(f"\n{said}{needs}", flush=True)
        left = [c for c in left if c.bytes < chosen.bytes * (min(1.0, chip.memory / compiled.peak) or 1.0)]
    figures = _figures(chip, devices, works[chosen.remat].in_parts(chosen.accumulation), chosen, compiled)
    print("\n" + _told(chip, chosen, compiled, figures))
    how = {"mesh": chosen.mesh, "remat": chosen.remat, "accumulation": chosen.accumulation}
    return {"topology": topology, **how, "batch": dataclasses.asdict(shape), **figures}


def planned(
    config: TrainConfig, sizes: ModelConfig, chip: Chip, images: int, length: int, remats: Sequence[str]
) -> tuple[Bucket, dict[str, Work]]:
    """A batch of a run, and what its step is by remat, on whatever mesh; raises as `roofline.bucket` and `setup.plan`."""
    if not chip.shapes:  # a GPU's kernel cannot be traced where there is none; the portable ones do the same products
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="auto"))
    config = computed(config, mesh="")
    found = {}
    for remat in remats:
        run, on_tpu = computed(config, remat=remat), bool(chip.shapes)
        key = json.dumps((to_json(run), dataclasses.asdict(sizes), on_tpu, images, length))
        if key not in _TRACED:  # it is the same for all TPUs, and for all GPUs
            anywhere = plan(run, sizes, meshes.abstract_mesh("data=1", chip))
            shape = roofline.bucket(anywhere, images, length)
            _TRACED[key] = shape, roofline.work(anywhere, shape)
        shape, found[remat] = _TRACED[key]
    return shape, found


def serve(config: TrainConfig, topology: str, *, rows: int, length: int | None, quantize: str | None) -> dict[str, Any]:
    """Compiles what answering takes, tensor parallel if no mesh is named, prints what it holds, and returns the figures.

    Args:
      config: of the run whose model is meant.
      topology: see `hardware.parse`.
      rows: questions that are answered at once, of one picture each.
      length: positions of a question and its answer; None is the longest that the run allows.
      quantize: int8 or int4 weights.

    Raises:
      UserError: an unknown topology, or one of GPUs; no libtpu.
    """
    chip, devices, shape_name = hardware.parse(topology)
    if not shape_name:
        raise UserError(f"{topology} cannot be compiled for here, only TPUs can: choose one of them")
    sizes = planned_config(config.start)
    tensor = math.gcd(devices, sizes.decoder.num_kv_heads)
    spec = config.compute.mesh or f"data={devices // tensor},tensor={tensor}"
    mesh = sharding.make_mesh(spec, hardware.described(shape_name))
    length = length or config.data.max_length
    ids = np.full(length // 2, IMAGE_TOKEN_ID, np.int32)
    ids[1:] = 0
    side = sizes.vision.image_size
    picture = np.zeros((sizes.tiles, side, side, 3), np.uint8)
    asked = [Request(ids, [picture], Sampling(length // 2))] * rows
    print(f"{topology}: {devices} x {chip.kind}, {chip.memory / 1e9:.1f} GB each; {spec}")
    asking = f"questions about a picture each, {length} positions with their answers, weights {quantize or 'bfloat16'}"
    figures = {"topology": topology, "mesh": spec, "length": length, "quantize": quantize}
    try:
        found = rehearse(sizes, asked, mesh, dtype=jnp.bfloat16, quantize=quantize)
    except TooLargeError as error:
        print(f"{rows} {asking}\n\nIt does not fit: {error}, or --quantize int8")
        return figures | {"rows": rows, "fits": False}
    print(f"{rows} {asking}; {found.rows} generate at once\n")
    print("| program | temporaries, GB | all that is alive, GB |\n|---|---|---|")
    for p in found.programs:
        print(f"| {p.name} | {p.temporaries / 1e9:.2f} | {p.peak / 1e9:.2f} |")
    fits = found.peak <= chip.memory
    verdict = "It fits." if fits else "It does not fit: more devices, fewer rows, shorter ones, or --quantize int8"
    held = f"parameters {found.parameters / 1e9:.2f} GB, at most {found.peak / 1e9:.2f} of {chip.memory / 1e9:.1f} GB"
    print(f"\n{held}. {verdict}")
    memory = {"parameters": found.parameters, "peak": found.peak, "of": chip.memory}
    return figures | {"rows": found.rows, "memory": memory, "fits": fits}


def compile_step(setup: Setup, shape: Bucket, options: Mapping[str, str]) -> Compiled:
    """The step of a run, compiled for the setup's mesh."""
    start = time.monotonic()
    with jax.set_mesh(setup.mesh):
        state, batch = roofline.planned_state(setup), roofline.abstract_batch(setup, shape)
        lowered = setup.step_function(roofline.STEPS).lower(state, batch)
        try:
            compiled = compile_for(lowered, options)
        except TooLargeError as error:
            return Compiled(error.needed or math.inf, 0.0, [], time.monotonic() - start, False)
    memory = compiled.memory_analysis()
    new = beside_arguments(memory, sharding.platform(setup.mesh))
    exchanged = program.collectives(compiled.as_text())
    return Compiled(memory.argument_size_in_bytes + new, new, exchanged, time.monotonic() - start, True)


def _figures(chip: Chip, devices: int, work: Work, chosen: Candidate, compiled: Compiled | None) -> dict[str, Any]:
    """What is printed, as numbers: bytes of one device, seconds, FLOPs of all devices."""
    held = dataclasses.asdict(chosen.held)
    exchanged = compiled.collectives if compiled and compiled.fits else chosen.exchanged
    seconds = roofline.receiving(chip, compiled.collectives) if compiled and compiled.fits else chosen.bound.exchange
    bound = roofline.bound(chip, devices, work, chosen.held, sum(c.received for c in exchanged), seconds)
    peak = compiled.peak if compiled else chosen.bytes
    fits = compiled.fits if compiled else chosen.fits
    temporaries = max(0.0, compiled.temporaries - chosen.kept) if compiled and compiled.fits else chosen.working
    memory = {**held, "activations": chosen.kept, "temporaries": temporaries, "peak": peak, "of": chip.memory}
    return {
        "compiled": bool(compiled),
        "fits": fits,
        "memory": memory,
        "flops": {"model": work.model_flops, "executed": work.executed_flops},
        "collectives": [dataclasses.asdict(c) for c in exchanged],
        "bound": {**dataclasses.asdict(bound), "step": bound.step},
        "seconds_to_compile": compiled.seconds if compiled else None,
    }


def _head(config: TrainConfig, topology: str, chip: Chip, devices: int, shape: Bucket) -> str:
    per = f"{config.data.batch_size} rows of {shape.length} positions, {shape.images} pictures each"
    return f"{topology}: {devices} x {chip.kind}, {chip.memory / 1e9:.1f} GB each\na step: {per}"


def _how(c: Candidate) -> str:
    return f"{c.mesh}, remat {c.remat}, {c.accumulation} part{'s' * (c.accumulation > 1)}"


def _mesh_table(found: list[Candidate]) -> str:
    lines = [
        "| mesh | remat | parts | state, GB | all, GB | exchange at least, s | step at least, s | MFU at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in found[:SHOWN]:
        fits = "" if c.fits else " (does not fit)"
        cells = f"{c.held.total / 1e9:.2f} | {c.bytes / 1e9:.2f} | {c.bound.exchange:.2f} | {c.bound.step:.2f}"
        lines.append(f"| {c.mesh}{fits} | {c.remat} | {c.accumulation} | {cells} | {c.bound.mfu:.0%} |")
    more = f"\n{len(found) - SHOWN} more are slower or do not fit." if len(found) > SHOWN else ""
    return "Estimated:\n" + "\n".join(lines) + more


def _told(chip: Chip, chosen: Candidate, compiled: Compiled | None, figures: dict[str, Any]) -> str:
    memory, bound, flops = figures["memory"], figures["bound"], figures["flops"]
    how = f"compiled in {compiled.seconds:.0f} s" if compiled else "estimated, not compiled"
    kinds = {
        "trained": "trained parameters",
        "frozen": "frozen parameters",
        "optimizer": "optimiser",
        "batch": "batch",
        "activations": "activations kept for the backward pass",
        "temporaries": "temporaries" if compiled else "gradients and logits",
    }
    lines = [f"{_how(chosen)}, {how}:", "", "| memory of a device | GB |", "|---|---|"]
    lines += [f"| {text} | {memory[k] / 1e9:.2f} |" for k, text in kinds.items()]
    lines += [f"| all that is alive at once | {memory['peak'] / 1e9:.2f} of {chip.memory / 1e9:.1f} |", ""]
    lines += ["| collective | devices | GB received | times |", "|---|---|---|---|"]
    for c in figures["collectives"]:
        lines.append(f"| {c['kind']} | {c['group']} | {c['received'] / 1e9:.2f} | {c['count'] or ''} |")
    verdict = "It fits" if figures["fits"] else "It does not fit: more devices, optimizer.accumulation, or shorter rows"
    lines += [
        "",
        f"{flops['model'] / 1e15:.2f} PFLOPs of the model, {flops['executed'] / 1e15:.2f} with what is computed again. "
        f"A step takes at least {bound['step']:.2f} s (products {bound['compute']:.2f}, memory {bound['memory']:.2f}, "
        f"exchange {bound['exchange']:.2f}); MFU at most {bound['mfu']:.0%}. {verdict}.",
    ]
    return "\n".join(lines)

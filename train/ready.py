"""How the shipped runs are computed on the usual pods and clusters: ``python -m train --on v5e-64 configs/…``.

The settings lie beside the configurations in ``ready.json``, which ``python benchmarks/scale.py`` writes from what it finds:
the mesh, what the backward pass keeps, and in how many parts the rows are computed. None of them changes what is learnt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lmm_jax.errors import UserError
from train.config import TrainConfig

FILE = "ready.json"


def computed(config: TrainConfig, *, mesh: str | None = None, remat: str = "", accumulation: int = 0) -> TrainConfig:
    """A run that is computed in another way, and learns the same; what is not given stays."""
    compute, optimizer = config.compute, config.optimizer
    compute = dataclasses.replace(compute, mesh=compute.mesh if mesh is None else mesh, remat=remat or compute.remat)
    optimizer = dataclasses.replace(optimizer, accumulation=accumulation or optimizer.accumulation)
    return dataclasses.replace(config, compute=compute, optimizer=optimizer)


def on(topology: str, config: TrainConfig, file: Path) -> TrainConfig:
    """The run of a configuration's file as it is computed on a topology.

    Raises:
      UserError: nothing is known of that file on that topology; the settings cannot be read.
    """
    found = file.with_name(FILE)
    try:
        known = json.loads(found.read_text("utf-8")) if found.is_file() else {}
    except ValueError as error:
        raise UserError(
            f"{found} is not JSON ({error}): write it again with benchmarks/scale.py, or leave out --on"
        ) from error
    if file.stem not in known:
        raise UserError(f"--on has no settings for {file}, only for {', '.join(known) or f'what {found} lists'}: leave it out")
    if topology not in known[file.stem]:
        raise UserError(f"--on has no settings for {file.stem} on {topology!r}: choose one of {', '.join(known[file.stem])}")
    try:
        return computed(config, **known[file.stem][topology])
    except TypeError as error:
        raise UserError(f"{found} is not understood ({error}): a setting has mesh, remat and accumulation") from error

"""AdamW by groups of parameters, each leaf in exactly one group (spec section 10)."""

from __future__ import annotations

import re
from collections.abc import Iterable

import optax

from lmm_jax.errors import UserError
from train.config import GroupConfig, OptimizerConfig


def assign_groups(paths: Iterable[str], groups: tuple[GroupConfig, ...]) -> dict[str, GroupConfig]:
    """The group of each parameter: path -> group.

    Args:
      paths: of all parameters, as ``layers/stack/mlp/up_proj/kernel``.
      groups: their patterns match whole paths, in which "stack" and "last" are left out.

    Raises:
      UserError: parameters in no group or in several, all of them; groups without any parameter.
    """
    assigned, faults, empty = {}, [], set(groups)
    for path in paths:
        name = re.sub(r"/(stack|last)(?=/)", "", path)
        found = [g for g in groups if re.fullmatch(g.pattern, name)]
        if len(found) != 1:
            faults.append(f"{path} is in {len(found)} groups" + (f" ({', '.join(g.pattern for g in found)})" if found else ""))
            continue
        assigned[path] = found[0]
        empty.discard(found[0])
    faults += [f"the group {g.pattern!r} matches no parameter" for g in groups if g in empty]
    if faults:
        raise UserError(
            "every parameter must be in exactly one group, and every group have one; change optimizer.groups: "
            + "; ".join(faults)
        )
    return assigned


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine down to ``final · peak`` at `steps`."""
    warmup = round(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), end_value=config.final * peak
    )


def make_optimizer(config: OptimizerConfig, groups: dict[str, GroupConfig], steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm of all trained parameters, then AdamW with each group's own rate and decay.

    Args:
      config: of the run.
      groups: of the trained parameters, path -> group; the parameters are a flat dict with these paths.
      steps: of the whole run, for the schedule.
    """
    distinct = sorted({g.pattern: g for g in groups.values()}.items())
    adamw = {
        pattern: optax.adamw(
            schedule(config, g.learning_rate, steps), config.b1, config.b2, config.eps, weight_decay=g.weight_decay
        )
        for pattern, g in distinct
    }
    update = optax.multi_transform(adamw, {path: g.pattern for path, g in groups.items()})
    return optax.chain(optax.clip_by_global_norm(config.clip), update) if config.clip else update

"""AdamW or Muon by groups of parameters, each leaf in exactly one group (spec section 10)."""

from __future__ import annotations

import re
from collections.abc import Iterable

import jax
import optax
import optax.contrib

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
    """Clipping by the global norm of all trained parameters, then AdamW or Muon with each group's own rate and decay.

    Args:
      config: of the run.
      groups: of the trained parameters, path -> group; the parameters are a flat dict with these paths.
      steps: of the whole run, for the schedule.
    """
    distinct = {g.pattern: g for g in groups.values()}
    methods = {pattern: _method(config, distinct[pattern], steps) for pattern in sorted(distinct)}
    update = optax.multi_transform(methods, {path: g.pattern for path, g in groups.items()})
    return optax.chain(optax.clip_by_global_norm(config.clip), update) if config.clip else update


def _method(config: OptimizerConfig, group: GroupConfig, steps: int) -> optax.GradientTransformation:
    """What updates the parameters of one group."""
    rate = schedule(config, group.learning_rate, steps)
    if config.method == "adamw":
        return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=group.weight_decay)
    return optax.contrib.muon(
        rate,
        eps=config.eps,
        weight_decay=group.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=group.weight_decay,
        muon_weight_dimension_numbers=lambda params: {path: matrix_axes(path, leaf) for path, leaf in params.items()},
        consistent_rms=0.2,  # updates as large as AdamW's, so that one learning rate serves both (arXiv 2502.16982)
    )


def matrix_axes(path: str, leaf: jax.Array | optax.MaskedNode) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are a matrix's rows and columns; None for one that Muon leaves to AdamW.

    Matrices are the kernels inside layers, all heads of an attention together, each layer of a stack on its own: not
    embeddings, the patches' and the vocabulary's projection, norms, biases and adapters, nor what is in another group.
    """
    *_, module, name = path.split("/")
    if isinstance(leaf, optax.MaskedNode) or name != "kernel" or module in ("patch_embedding", "lm_head"):
        return None
    axes = tuple(range(path.count("/stack/"), leaf.ndim))
    rows = len(axes) - 1 if module in ("o_proj", "out_proj") else 1
    return optax.contrib.MuonDimensionNumbers(axes[:rows], axes[rows:])

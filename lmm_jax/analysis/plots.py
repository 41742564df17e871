"""All plots; matplotlib is imported here only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmm_jax.analysis.attention import TYPES, Attention
from lmm_jax.analysis.report import COMPONENTS, Report, flops_unit
from lmm_jax.errors import UserError

_TOKENS = 4  # maps that are drawn of a picture


def costs(report: Report, file: Path) -> Path:
    """Components of every variant as stacked bars, times likewise where they were measured, and the two kinds of video."""
    widths = (3, 2, 2) if report.measured else (3, 2)
    figure, (bars, *times, lines) = plt.subplots(1, len(widths), figsize=(12, 5), width_ratios=widths, layout="constrained")
    name, size = flops_unit(report)
    names = [c.name for c in report.models]
    _stack(bars, names, [{part: flops / size for part, flops in c.ours.items()} for c in report.models])
    bars.plot([c.published["total"] / size for c in report.models], names, "k|", markersize=14, label="published program")
    bars.set_xlabel(f"{name} of a question")
    bars.legend(fontsize="small", loc="upper right", bbox_to_anchor=(1.0, 0.88))
    for axis in times:
        _stack(axis, names, [{part: 1e3 * seconds for part, seconds in m.parts.items()} for m in report.measured])
        axis.plot([1e3 * m.first for m in report.measured], names, "k|", markersize=14, label="first token")
        axis.set_yticks([])
        axis.set_xlabel(f"milliseconds on {report.device}")
        axis.legend(fontsize="small", loc="upper right", bbox_to_anchor=(1.0, 0.88), handles=axis.lines)
    for kind in (1, 2):
        frames = [row[0] for row in report.videos]
        totals = [row[kind].ours["total"] / size for row in report.videos]
        lines.loglog(frames, totals, "o-", label=report.videos[0][kind].name)
    lines.set_xlabel("frames of a video")
    lines.set_ylabel(f"{name} of a question")
    lines.grid(alpha=0.3)
    lines.legend()
    figure.suptitle(report.title)
    return _save(figure, file)


def _stack(axis: Axes, names: Sequence[str], values: Sequence[dict[str, float]]) -> None:
    """Bars of components, the first on top."""
    left = [0.0] * len(names)
    for component in COMPONENTS:
        widths = [of.get(component, 0.0) for of in values]
        axis.barh(names, widths, left=left, label=component)
        left = [a + b for a, b in zip(left, widths)]
    axis.invert_yaxis()


def by_layer(seen: Attention, file: Path) -> Path:
    """Weights and entropies of answer and instruction, layer by layer."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for row, asking in zip(axes, ("response", "instruction")):
        for axis, values, unit in zip(row, (seen.weights, seen.entropy), ("attention weight", "entropy, nats")):
            for key, looked_at in enumerate(TYPES[:2] if asking == "instruction" else TYPES):  # which does not see answers
                axis.plot(values[:, TYPES.index(asking), key], "o-", markersize=3, label=f"{asking} → {looked_at}")
            axis.set_ylabel(unit)
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, file)


def hiding(hidden: Sequence[tuple[int, int, float]], file: Path) -> Path:
    """What it changes when groups of layers do not see the vision tokens."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    names = [str(first) if first == last else f"{first}–{last}" for first, last, _ in hidden]
    axis.bar(names, [nats for *_, nats in hidden])
    axis.set_xlabel("layers that the vision tokens are hidden from")
    axis.set_ylabel("change of the answer's words, nats")
    return _save(figure, file)


def maps(pictures: Sequence[np.ndarray], found: Sequence[np.ndarray], file: Path) -> Path:
    """Compression maps over their pictures; of many tokens the first few."""
    columns = 1 + min(_TOKENS, len(found[0]))
    figure, axes = plt.subplots(
        len(pictures), columns, figsize=(3 * columns, 3 * len(pictures)), squeeze=False, layout="constrained"
    )
    for row, picture, of in zip(axes, pictures, found):
        whole = picture[-1]  # the last tile
        row[0].imshow(whole)
        for axis, token, number in zip(row[1:], of, range(_TOKENS)):
            axis.imshow(whole, alpha=0.4)
            axis.imshow(token, cmap="magma", alpha=0.7, extent=(0, whole.shape[1], whole.shape[0], 0))
            axis.set_title(f"token {number}, largest {token.max():.2f}", fontsize="small")
        for axis in row:
            axis.set_axis_off()
    return _save(figure, file)


def _save(figure: Figure, file: Path) -> Path:
    """Raises UserError where the file cannot be written, or is of a kind that cannot be drawn."""
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be drawn: {error}") from error
    finally:
        plt.close(figure)
    return file

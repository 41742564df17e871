"""``lmm report``: FLOPs, parameters, memory and times of a model and its variants, as tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmm_jax.analysis import costs
from lmm_jax.analysis.costs import Cost
from lmm_jax.config import ModelConfig
from lmm_jax.errors import DeviceError, UserError

if TYPE_CHECKING:
    from lmm_jax.analysis.timing import Timing

_NOTHING = "–"
COMPONENTS = ("vision encoder", "compressor", "projector", "pre-fusion, image", "pre-fusion, text", "decoder", "logits")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Report:
    """What is shown of a model.

    Attributes:
      title: says what the costs are of.
      models: the variants, with the costs of one question about some images.
      parameters: of each variant, by its name.
      videos: (frames, cost) of LLaVA-v1.5 and of the model itself, for each length.
      published: whether published figures can stand beside the costs.
      dtype: of numbers in memory.
      measured: times of each variant on `device`; none where they were not asked for.
      device: what it was measured on.
    """

    title: str
    models: Sequence[Cost]
    parameters: dict[str, int]
    videos: Sequence[tuple[int, Cost, Cost]]
    published: bool
    dtype: str
    measured: Sequence[Timing] = ()
    device: str = ""


def make(
    name: str, config: ModelConfig, images: int, text: int, *, attention: bool = False, dtype: str = "bfloat16"
) -> Report:
    """The costs of a model and its variants.

    Args:
      name: of the model, in the title.
      config: of the model.
      images: pictures that are asked about.
      text: tokens of the prompt.
      attention: whether attention's own products count; papers leave them out.
      dtype: of weights, keys and values: "bfloat16" or "float32".

    Raises:
      UserError: a number that is not positive.
    """
    if min(images, text) < 1:
        raise UserError(f"{images} images and {text} tokens of text: expected at least 1 of both")
    count = functools.partial(costs.cost, text=text, attention=attention, bytes_each=_DTYPE_BYTES[dtype])
    sized = costs.variants(config)
    models = [count(of, images) for of in sized]
    mini = config if config.compressor else sized[1]
    videos = [(n, count(sized[0], n), count(mini, n)) for n in costs.FRAMES]
    parameters = {costs.label(of): count_parameters(of) for of in sized}
    how = "with" if attention else "without"
    title = f"{name}, {images} image{'s' * (images > 1)} and {text} tokens of text, {how} attention's own products, {dtype}"
    published = costs.is_published_case(config, images, text, attention)
    return Report(title, models, parameters, videos, published, dtype)


def with_times(report: Report, config: ModelConfig, images: int, text: int) -> Report:
    """Measures each variant on the first device that is here, with random weights of its sizes.

    `report` was made with the other arguments. Raises DeviceError where the device cannot hold or run a variant.
    """
    import jax

    from lmm_jax.analysis import timing
    from lmm_jax.inference.compiling import use_compilation_cache
    from lmm_jax.sharding import make_mesh

    use_compilation_cache()
    mesh = make_mesh()
    measured = []
    for of in costs.variants(config):
        print(f"measuring {costs.label(of)}", file=sys.stderr)
        try:
            measured.append(timing.measure(of, images, text, mesh, dtype=report.dtype))
        except jax.errors.JaxRuntimeError as error:
            raise DeviceError(f"{costs.label(of)} cannot be measured here: {str(error).splitlines()[0]}") from error
    return dataclasses.replace(report, measured=measured, device=jax.devices()[0].device_kind)


def count_parameters(config: ModelConfig) -> int:
    """Numbers that a question needs; the encoder's last block is none of them."""
    import jax

    from lmm_jax.models.llava_mini import abstract_params
    from lmm_jax.sharding import make_mesh

    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, make_mesh())))


def markdown(report: Report) -> str:
    """Tables, and what is to be said of the published figures."""
    parts = [f"# {report.title}", *map(_table, (_question(report), _memory(report), _videos(report)))]
    if report.measured:
        parts += [f"Measured with random weights on {report.device}:", _table(_times(report.measured))]
    parts += ["\n".join(f"- {note}" for note in costs.NOTES)] * report.published
    return "\n\n".join(parts) + "\n"


def _question(report: Report) -> list[list[str]]:
    name, size = flops_unit(report)
    rows = [[name, *COMPONENTS, "total", "asked again", "published program"]]
    for c in report.models:
        parts = [c.ours.get(part) for part in (*COMPONENTS, "total")]
        rows.append([c.name, *(_number(flops, size) for flops in (*parts, c.again, c.published["total"]))])
    if report.published:
        figures = [costs.PUBLISHED.get(c.name, ()) for c in report.models]
        rows[0].append("published figure")
        for row, of in zip(rows[1:], figures):
            row.append(" or ".join(f"{figure:.2f}" for figure in of) or _NOTHING)
    return rows


def _memory(report: Report) -> list[list[str]]:
    rows = [["memory", "parameters", "weights", "cache of the images", "kept to be asked again", "GFLOPs per new token"]]
    for c in report.models:
        number = report.parameters[c.name]
        sizes = (number * _DTYPE_BYTES[report.dtype], c.cache_bytes, c.prefix_bytes)
        rows.append([c.name, f"{number / 1e9:.3f} B", *map(_bytes, sizes), _number(c.token, 1e9)])
    return rows


def _videos(report: Report) -> list[list[str]]:
    name, size = flops_unit(report)
    rows = [["video, frames", *(f"{c.name}: {what}" for c in report.videos[0][1:] for what in (name, "cache"))]]
    for frames, *of in report.videos:
        rows.append([f"{frames:,}", *(t for c in of for t in (_number(c.ours["total"], size), _bytes(c.cache_bytes)))])
    return rows


def _times(measured: Sequence[Timing]) -> list[list[str]]:
    rows = [["milliseconds", *COMPONENTS, "first token", "asked again", "each new token", "most memory"]]
    for m in measured:
        times = [*(m.parts.get(name) for name in COMPONENTS), m.first, m.again, m.token]
        rows.append([m.name, *(_NOTHING if s is None else f"{1e3 * s:,.2f}" for s in times), _bytes(m.memory)])
    return rows


def as_json(report: Report) -> str:
    """All figures, in FLOPs and bytes."""
    values: dict[str, Any] = dataclasses.asdict(report)
    values["published_figures"] = costs.PUBLISHED if report.published else {}
    return json.dumps(values, indent=2) + "\n"


def flops_unit(report: Report) -> tuple[str, float]:
    """What FLOPs are shown in, and its size: TFLOPs, or GFLOPs for a small model."""
    return ("TFLOPs", 1e12) if max(c.ours["total"] for c in report.models) >= 1e11 else ("GFLOPs", 1e9)


def _number(value: float | None, size: float) -> str:
    if value is None:
        return _NOTHING
    return f"{value / size:,.2f}" if value >= size / 10 else f"{value / size:.4f}"


def _bytes(number: float) -> str:
    unit, size = ("MB", 1e6) if number < 1e9 else ("GB", 1e9)
    return f"{number / size:,.{0 if number >= 100 * size else 1}f} {unit}" if number else _NOTHING


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    padded = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (padded[0], rule, *padded[1:]))

"""``lmm report``: FLOPs, parameters and memory of a model and its variants, as tables."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

from lmm_jax.analysis import costs
from lmm_jax.analysis.costs import Cost
from lmm_jax.config import ModelConfig
from lmm_jax.errors import UserError

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
    """

    title: str
    models: Sequence[Cost]
    parameters: dict[str, int]
    videos: Sequence[tuple[int, Cost, Cost]]
    published: bool
    dtype: str


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


def count_parameters(config: ModelConfig) -> int:
    """Numbers that a question needs; the encoder's last block is none of them."""
    import jax

    from lmm_jax.models.llava_mini import abstract_params
    from lmm_jax.sharding import make_mesh

    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, make_mesh())))


def markdown(report: Report) -> str:
    """Tables, and what is to be said of the published figures."""
    head = ["TFLOPs", *COMPONENTS, "total", "asked again", "published program"]
    rows = [
        [c.name, *(_tera(c.ours.get(n)) for n in (*COMPONENTS, "total")), _tera(c.again), _tera(c.published["total"])]
        for c in report.models
    ]
    if report.published:
        head.append("published figure")
        for row, c in zip(rows, report.models):
            row.append(" or ".join(f"{figure:.2f}" for figure in costs.PUBLISHED.get(c.name, ())) or _NOTHING)
    memory = [["memory", "parameters", "weights", "cache of the images", "kept to be asked again", "GFLOPs per new token"]]
    for c in report.models:
        number = report.parameters[c.name]
        sizes = (number * _DTYPE_BYTES[report.dtype], c.cache_bytes, c.prefix_bytes)
        memory.append([c.name, f"{number / 1e9:.3f} B", *map(_bytes, sizes), f"{c.token / 1e9:.1f}"])
    names = [c.name for c in report.videos[0][1:]]
    video = [["video, frames", *(f"{n}: {what}" for n in names for what in ("TFLOPs", "cache"))]]
    for frames, *of in report.videos:
        video.append([f"{frames:,}", *(text for c in of for text in (_tera(c.ours["total"]), _bytes(c.cache_bytes)))])
    parts = [f"# {report.title}", *map(_table, ([head, *rows], memory, video))]
    parts += ["\n".join(f"- {note}" for note in costs.NOTES)] * report.published
    return "\n\n".join(parts) + "\n"


def as_json(report: Report) -> str:
    """All figures, in FLOPs and bytes."""
    values: dict[str, Any] = dataclasses.asdict(report)
    values["published_figures"] = costs.PUBLISHED if report.published else {}
    return json.dumps(values, indent=2) + "\n"


def _tera(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value / 1e12:.2f}" if value >= 1e11 else f"{value / 1e12:.4f}"


def _bytes(number: float) -> str:
    unit, size = ("MB", 1e6) if number < 1e9 else ("GB", 1e9)
    return f"{number / size:,.{0 if number >= 100 * size else 1}f} {unit}" if number else _NOTHING


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    padded = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (padded[0], rule, *padded[1:]))

"""``lmm report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lmm_jax.analysis.flops import PUBLISHED_TEXT
from lmm_jax.config import ModelConfig, named_sizes
from lmm_jax.errors import UserError


def report(args: argparse.Namespace) -> None:
    """FLOPs, parameters and memory of a model and its variants, beside what was published."""
    from lmm_jax.analysis import report

    name, config = _config(args.model)
    made = report.make(name, config, args.images, args.text, attention=args.attention, dtype=args.dtype)
    print(report.markdown(made), end="")
    for file, text in ((args.markdown, report.markdown), (args.json, report.as_json)):
        if file:
            _write(file, text(made))
    if args.plot:
        report.plot(made, args.plot)


def _config(model: str) -> tuple[str, ModelConfig]:
    """A named size's, or a model folder's."""
    if model in named_sizes():
        return model, named_sizes()[model]
    if not Path(model).is_dir():
        raise UserError(f"{model} is neither a model folder nor a size with a name: {', '.join(named_sizes())}")
    from lmm_jax.checkpoint import read_config

    return Path(model).name, read_config(Path(model))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from error


def add_parser(commands: Any) -> None:
    """Adds ``report`` to the command line."""
    made = commands.add_parser("report", help="what a model costs", description=(report.__doc__ or "").splitlines()[0])
    made.add_argument(
        "model", nargs="?", default="llava-mini-vicuna-7b", help="a model folder, or a size by name (llava-mini-vicuna-7b)"
    )
    made.add_argument("--images", type=int, default=1, metavar="N", help="pictures that are asked about (1)")
    made.add_argument("--text", type=int, default=PUBLISHED_TEXT, metavar="N", help=f"tokens of the prompt ({PUBLISHED_TEXT})")
    made.add_argument("--attention", action="store_true", help="count attention's own products, too")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of numbers in memory (bfloat16)")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as PNG, SVG or PDF (needs matplotlib)")
    made.set_defaults(run=report)

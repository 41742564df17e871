"""``lmm report | inspect``."""

from __future__ import annotations

import argparse
import types
import warnings
from pathlib import Path
from typing import Any

from lmm_jax import storage
from lmm_jax.analysis.flops import PUBLISHED_TEXT
from lmm_jax.config import TEMPLATES, ModelConfig, named_sizes
from lmm_jax.demo import MODEL
from lmm_jax.errors import UserError


def report(args: argparse.Namespace) -> None:
    """FLOPs, parameters, memory and times of a model and its variants, beside what was published."""
    from lmm_jax.analysis import report

    name, config = _config(args.model)
    plots = _plots() if args.plot else None
    made = report.make(name, config, args.images, args.text, attention=args.attention, dtype=args.dtype)
    if args.measure:
        made = report.with_times(made, config, args.images, args.text)
    print(report.markdown(made), end="")
    for file, text in ((args.markdown, report.markdown), (args.json, report.as_json)):
        if file:
            _write(file, text(made))
    if plots:
        plots.costs(made, args.plot)


def inspect(args: argparse.Namespace) -> None:
    """What a model looks at while it answers: attention by layer, what hiding the vision tokens changes, compression maps."""
    plots = _plots()
    from lmm_jax.analysis import inspection
    from lmm_jax.inference.assistant import Question, Video
    from lmm_jax.inference.loading import load

    if args.model is None:
        warnings.warn("without --model DIR it is the demo model, which knows coloured shapes only", stacklevel=2)
    model = load(args.model or MODEL, mesh=args.mesh, dtype=args.dtype)
    video = Video(args.video, args.start, args.end, args.fps) if args.video else None
    asked = {"answer": args.answer, "group": args.group, "max_new_tokens": args.max_new_tokens, "template": args.template}
    found = inspection.inspect(model, Question(args.question, args.image, video), **asked)
    print(inspection.table(found), end="")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out} cannot be made: {error}") from error
    inspection.write_arrays(found, args.out / "inspect.npz")
    plots.by_layer(found.seen, args.out / "attention.png")
    plots.hiding(found.hidden, args.out / "hidden.png")
    if found.maps:
        plots.maps(found.pictures, found.maps, args.out / "compression.png")


def _plots() -> types.ModuleType:
    try:
        from lmm_jax.analysis import plots
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'lmm-jax[plot]'") from error
    return plots


def _config(model: str) -> tuple[str, ModelConfig]:
    """A named size's, or a model folder's."""
    if model in named_sizes():
        return model, named_sizes()[model]
    if not storage.is_remote(model) and not Path(model).is_dir():
        raise UserError(f"{model} is neither a model folder nor a size with a name: {', '.join(named_sizes())}")
    from lmm_jax.checkpoint import read_config

    return Path(model).name, read_config(model)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from error


def add_parsers(commands: Any) -> None:
    """Adds ``report`` and ``inspect`` to the command line."""
    made = commands.add_parser("report", help="what a model costs", description=(report.__doc__ or "").splitlines()[0])
    made.add_argument(
        "model", nargs="?", default="llava-mini-vicuna-7b", help="a model folder, or a size by name (llava-mini-vicuna-7b)"
    )
    made.add_argument("--images", type=int, default=1, metavar="N", help="pictures that are asked about (1)")
    made.add_argument("--text", type=int, default=PUBLISHED_TEXT, metavar="N", help=f"tokens of the prompt ({PUBLISHED_TEXT})")
    made.add_argument("--attention", action="store_true", help="count attention's own products, too")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of numbers in memory (bfloat16)")
    made.add_argument("--measure", action="store_true", help="measure each variant here, too, with random weights")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as PNG, SVG or PDF (needs matplotlib)")
    made.set_defaults(run=report)

    made = commands.add_parser("inspect", help="what a model looks at", description=(inspect.__doc__ or "").splitlines()[0])
    made.add_argument("question", help="the question")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for arrays and plots (needs matplotlib)")
    made.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    made.add_argument("--video", metavar="FILE", help="a video")
    made.add_argument("--start", type=float, metavar="SECONDS", help="where to begin in the video")
    made.add_argument("--end", type=float, metavar="SECONDS", help="where to stop in the video")
    made.add_argument("--fps", type=float, default=1.0, metavar="N", help="frames taken per second of video (1)")
    made.add_argument("--answer", metavar="TEXT", help="the answer that is looked at (the model's own)")
    made.add_argument("--group", type=int, metavar="N", help="layers that vision is hidden from at a time (an eighth of them)")
    made.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (64)")
    made.add_argument("--model", metavar="DIR", help="a model folder, made by python -m conversion from-hf (the demo model)")
    made.add_argument("--mesh", metavar="SIZES", help="devices to use, as data=1,fsdp=8,tensor=1 (one device)")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic (by platform)")
    made.add_argument("--template", choices=TEMPLATES, help="prompt template (the model's own)")
    made.set_defaults(run=inspect)

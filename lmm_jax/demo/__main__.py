"""Makes the small visual world: ``python -m lmm_jax.demo data|test-set|tokenizer FOLDER``."""

from __future__ import annotations

import argparse
import os
import sys

from tqdm import tqdm

from lmm_jax.cli import run_command
from lmm_jax.demo.dataset import OBJECTS, TURNS, write_dataset, write_test_set
from lmm_jax.demo.tokenizer import write_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    return run_command(lambda: args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmm_jax.demo", description="The small visual world.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="pictures, clips and conversations to train on")
    data.add_argument("--turns", type=int, nargs=2, default=TURNS, metavar="N", help="questions in a conversation (1 6)")
    data.add_argument("--times", type=_times, nargs="+", default=[], metavar="TYPE=N", help="ask a type N times as often")
    data.set_defaults(run=_data)
    test = commands.add_parser("test-set", help="pictures, clips and single questions to measure with")
    test.set_defaults(run=_test_set)
    tokenizer = commands.add_parser("tokenizer", help="the tokenizer")
    tokenizer.set_defaults(run=lambda args: write_tokenizer(args.folder, seed=args.seed))

    for command in (data, test, tokenizer):
        command.add_argument("folder", help="where to write; made if need be")
        command.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    for command in (data, test):
        command.add_argument("--images", type=int, default=0, metavar="N", help="how many pictures (0)")
        command.add_argument("--clips", type=int, default=0, metavar="N", help="how many clips (0)")
        command.add_argument("--objects", type=int, nargs=2, default=OBJECTS, metavar="N", help="in a picture (1 5)")
        command.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (one per core)")
    return parser


def _times(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    return name, int(number)  # argparse turns the error of `int` into a message


def _data(args: argparse.Namespace) -> None:
    with tqdm(total=args.images + args.clips, unit="records") as bar:
        write_dataset(
            args.folder,
            images=args.images,
            clips=args.clips,
            seed=args.seed,
            objects=tuple(args.objects),
            turns=tuple(args.turns),
            times=dict(args.times),
            progress=bar.update,
            workers=args.workers,
        )


def _test_set(args: argparse.Namespace) -> None:
    with tqdm(total=args.images + args.clips, unit="records") as bar:
        write_test_set(
            args.folder,
            images=args.images,
            clips=args.clips,
            seed=args.seed,
            objects=tuple(args.objects),
            progress=bar.update,
            workers=args.workers,
        )


if __name__ == "__main__":
    sys.exit(main())

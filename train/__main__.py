"""``python -m train CONFIG [--field value …]``; also ``inspect-data``, ``compile`` and ``export CONFIG``."""

from __future__ import annotations

import argparse
import json
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from lmm_jax.cli import run_command
from lmm_jax.cluster import HELP, join_processes
from lmm_jax.errors import UserError
from train.config import TrainConfig
from train.ready import on

USAGE = f"""\
usage: python -m train CONFIG [--field value ...]        train, or go on with, a run
       python -m train inspect-data [--samples 3] [--media 100] CONFIG [...]
                                                         what a run would read, without loading a model; shows some
                                                         records, tries the pictures and videos of some others
       python -m train export [--step N] CONFIG [...]    write the model folder of a run's last, or Nth, checkpoint
       python -m train compile --topology v5e-64 [--images 1] [--length 4096] [--search] [--full]
                               [--json FILE] CONFIG [...]
                                                         what a run would take on devices that are not here: memory, mesh,
                                                         exchange, least time of a step; TPUs: pip install 'lmm-jax[tpu-aot]'
       python -m train compile --topology v5e-4 --serve [--rows 16] [--length 4096] [--quantize int8] CONFIG [...]
                                                         the same of answering with the run's model
       python -m train --on v5e-64 CONFIG [...]          with the mesh and what else suits those devices, where it is known
       python -m train CONFIG --help                     all fields of a configuration

CONFIG is a Python file with a function get_config() -> train.config.TrainConfig, as those in configs/.
The same command again goes on with a run that was stopped. {HELP}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, 1 where training diverged, 2 for bad input, 130 or 143 when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    command = words.pop(0) if words[0] in _COMMANDS and words[0] != "train" else "train"
    status = 0

    def run() -> None:
        nonlocal status
        status = _COMMANDS[command](words)

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    return run_command(run) or status


def _config(words: Sequence[str]) -> TrainConfig:
    import tyro

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--on")
    own, words = _known(parser, "train", words)
    if not words:
        raise UserError("there is no configuration: give a Python file, as configs/stage1_vicuna_7b.py")
    file = Path(words[0])
    if not file.is_file():
        raise UserError(f"there is no configuration {file}: give a Python file, as configs/stage1_vicuna_7b.py")
    sys.path.insert(0, str(file.resolve().parent.parent))  # configs import their neighbours as configs.…
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        made = get_config() if get_config else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(made, TrainConfig):
        raise UserError(f"{file} has no function get_config() that returns a TrainConfig")
    return tyro.cli(
        TrainConfig,
        default=on(own.on, made, file) if own.on else made,
        args=list(words[1:]),
        prog=f"python -m train {file}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _train(words: Sequence[str]) -> int:
    config = _config(words)
    join_processes()
    from lmm_jax.inference.compiling import use_compilation_cache
    from train.loop import DivergedError, train

    use_compilation_cache()
    try:
        return 0 if train(config) else 143
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _export(words: Sequence[str]) -> int:
    own, words = _own("export", words, step=None)
    config = _config(words)
    join_processes()
    from train.loop import export_checkpoint

    print(export_checkpoint(config, own.step))
    return 0


def _inspect(words: Sequence[str]) -> int:
    own, words = _own("inspect-data", words, samples=3, media=100)
    config = _config(words)
    from lmm_jax.data.tokenize import Tokenizer
    from train.inspect_data import inspect
    from train.start import model_config, tokenizer_folder

    tokenizer = Tokenizer.load(tokenizer_folder(config.start))
    inspect(config, model_config(config.start), tokenizer, samples=own.samples, media=own.media)
    return 0


def _compile(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--json", type=Path)
    for flag in ("--serve", "--search", "--full"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    own, words = _known(parser, "compile", words)
    numbers, words = _own("compile", words, images=None, length=None, rows=None)
    if not own.topology:
        raise UserError("compile needs --topology, as v5e-64, v5p-128, v6e-256 or h100-8")
    own_of_steps = {"--images": numbers.images, "--search": own.search or None, "--full": own.full or None}
    misplaced = own_of_steps if own.serve else {"--rows": numbers.rows, "--quantize": own.quantize}
    if any(value is not None for value in misplaced.values()) or 0 in (numbers.rows, numbers.length):
        raise UserError(
            "compile takes --rows and --quantize with --serve, --images, --search and --full without; "
            "--rows and --length from 1 on"
        )
    if own.json and not own.json.parent.is_dir():
        raise UserError(f"there is no folder {own.json.parent} for the figures: make it, or choose another --json")
    config = _config(words)
    from train.hardware import quiet_libtpu

    quiet_libtpu()
    from train import compile

    if own.serve:
        wanted = {"rows": numbers.rows or 16, "length": numbers.length, "quantize": own.quantize}
        figures = compile.serve(config, own.topology, **wanted)
    else:
        images = 1 if numbers.images is None else numbers.images
        wanted = {"images": images, "length": numbers.length, "search": own.search, "full": own.full}
        figures = compile.run(config, own.topology, **wanted)
    if own.json:
        own.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["fits"] else 1


def _known(parser: argparse.ArgumentParser, command: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a command takes itself, and the words that are left."""
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{command}: {error}") from error


def _own(command: str, words: Sequence[str], **defaults: int | None) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, numbers from 0 on, and the words that are left for `_config`."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    own, left = _known(parser, command, words)
    if any(value is not None and value < 0 for value in vars(own).values()):
        raise UserError(f"{command} takes numbers from 0 on for {', '.join(f'--{name}' for name in defaults)}")
    return own, left


_COMMANDS = {"train": _train, "export": _export, "inspect-data": _inspect, "compile": _compile}

if __name__ == "__main__":
    sys.exit(main())

"""``python -m train CONFIG [--field value …]``; also ``inspect-data CONFIG`` and ``export CONFIG``."""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from lmm_jax.cli import run_command
from lmm_jax.errors import UserError
from train.config import TrainConfig

USAGE = """\
usage: python -m train CONFIG [--field value ...]        train, or go on with, a run
       python -m train inspect-data [--samples 3] [--media 100] CONFIG [...]
                                                         what a run would read, without loading a model; shows some
                                                         records, tries the pictures and videos of some others
       python -m train export CONFIG [...]               write the model folder of a run's last checkpoint
       python -m train CONFIG --help                     all fields of a configuration

CONFIG is a Python file with a function get_config() -> train.config.TrainConfig, as those in configs/.
The same command again goes on with a run that was stopped. On several machines start one process on each;
LMM_COORDINATOR=host:port, LMM_PROCESSES=n and LMM_PROCESS=i say who is who, where the cluster (a TPU pod, SLURM)
does not: LMM_COORDINATOR=auto then asks it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, 1 where training diverged, 2 for bad input, 130 or 143 when stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    command = words.pop(0) if words[0] in ("inspect-data", "export") else "train"
    status = 0

    def run() -> None:
        nonlocal status
        if not words:
            raise UserError(f"{command} needs a configuration, as configs/stage1_vicuna_7b.py")
        status = _COMMANDS[command](words)

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    return run_command(run) or status


def _config(words: Sequence[str]) -> TrainConfig:
    import tyro

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
        default=made,
        args=list(words[1:]),
        prog=f"python -m train {file}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _join_processes() -> None:
    """Makes the processes of a cluster one program; must come before any use of a device."""
    import jax

    address, who = os.environ.get("LMM_COORDINATOR"), {}
    if not address:
        return
    if address != "auto":
        try:
            count, own = int(os.environ["LMM_PROCESSES"]), int(os.environ["LMM_PROCESS"])
        except (KeyError, ValueError) as error:
            raise UserError("LMM_COORDINATOR=host:port also needs LMM_PROCESSES and LMM_PROCESS, two numbers") from error
        who = {"coordinator_address": address, "num_processes": count, "process_id": own}
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the loop's own affair
    try:
        jax.distributed.initialize(**who)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes do not find each other at LMM_COORDINATOR={address}: {error}") from error


def _train(words: Sequence[str]) -> int:
    config = _config(words)
    _join_processes()
    from lmm_jax.inference.assistant import use_compilation_cache
    from train.loop import DivergedError, train

    use_compilation_cache()
    try:
        return 0 if train(config) else 143
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _export(words: Sequence[str]) -> int:
    config = _config(words)
    _join_processes()
    from train.loop import export_checkpoint

    print(export_checkpoint(config))
    return 0


def _inspect(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--media", type=int, default=100)
    try:
        own, words = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"inspect-data: {error}") from error
    if own.samples < 0 or own.media < 0:
        raise UserError(f"inspect-data takes numbers from 0 on, not --samples {own.samples} --media {own.media}")
    config = _config(words)
    from lmm_jax.data.tokenize import Tokenizer
    from train.inspect_data import inspect
    from train.start import model_config, tokenizer_folder

    tokenizer = Tokenizer.load(tokenizer_folder(config.start))
    inspect(config, model_config(config.start), tokenizer, samples=own.samples, media=own.media)
    return 0


_COMMANDS = {"train": _train, "export": _export, "inspect-data": _inspect}

if __name__ == "__main__":
    sys.exit(main())

"""``python -m conversion from-hf SRC DST`` and ``to-hf SRC DST``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before lmm_jax imports jax: a conversion leaves accelerators alone

from conversion.from_hf import DTYPES, Options, compose, from_hf
from conversion.to_hf import to_hf
from lmm_jax.config import TEMPLATES
from lmm_jax.errors import UserError

_FROM_HF = """\
SRC is a folder or a hub name (owner/name): LLaVA-Mini or LLaVA-v1.5 with its own tensor names, in safetensors or
pytorch_model*.bin, whole or as a LoRA adapter. With --llm and --vision instead of SRC, DST becomes the start of
stage 1: that language model, that CLIP, and a random projector.

Nothing is written unless every tensor is known, there once, and of the expected shape. fp16, bf16 and fp32 are kept as
they are, unless --dtype says otherwise. Buffers are left out: rotary_emb.inv_freq, embeddings.position_ids, and of a
whole CLIP text_model.*, visual_projection, text_projection and logit_scale; what was left out is printed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 for bad input (one sentence on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion",
        description="Move checkpoints between Hugging Face format and model folders of lmm-jax.",
        epilog="`python -m conversion from-hf --help` and `to-hf --help` tell more.",
    )
    parser.add_argument("command", choices=_COMMANDS, help="from-hf: to a model folder; to-hf: from a model folder")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    args = parser.parse_args(argv)
    try:
        _COMMANDS[args.command](args.arguments)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _from_hf(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m conversion from-hf",
        usage="%(prog)s [options] SRC DST\n       %(prog)s [options] --llm DIR --vision DIR DST",
        description=_FROM_HF,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="SRC DST", help="the checkpoint, and the model folder to write")
    parser.add_argument("--llm", metavar="DIR", help="text-only LLaMA (Vicuna, LLaMA-3.1) to start stage 1 from")
    parser.add_argument("--vision", metavar="DIR", help="CLIP to use instead of the one config.json names (mm_vision_tower)")
    parser.add_argument("--seed", type=int, default=0, help="of the random projector that --llm gets (default 0)")
    parser.add_argument("--base", metavar="DIR", help="model that a LoRA adapter is merged on (default: the one it names)")
    parser.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer from here")
    parser.add_argument("--template", choices=TEMPLATES, help="prompt template (default: what the tokenizer tells)")
    parser.add_argument(
        "--ignore", metavar="REGEX", action="append", default=[], help="leave out such tensors; may be repeated"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: each keeps its own)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model folder")
    args = parser.parse_intermixed_args(argv)
    options = Options(args.tokenizer, args.template, args.ignore, args.overwrite, args.dtype)
    if args.llm is None:
        if len(args.paths) != 2:
            parser.error("expected SRC and DST")
        from_hf(*args.paths, options, base=args.base, vision=args.vision)
        return
    if len(args.paths) != 1 or args.vision is None or args.base is not None:
        parser.error("--llm goes with --vision and DST, without SRC and --base")
    compose(args.llm, args.vision, args.paths[0], options, seed=args.seed)


def _to_hf(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m conversion to-hf",
        description="Write the model folder SRC as a checkpoint that the published PyTorch code loads: safetensors, "
        "config.json, tokenizer files. A model that came from Hugging Face goes back bit by bit.",
    )
    parser.add_argument("src", metavar="SRC", help="the model folder")
    parser.add_argument("dst", metavar="DST", help="folder to write, new or empty")
    parser.add_argument("--max-shard-size", type=_gigabytes, default=5.0, metavar="GB", help="of one file (default 5)")
    args = parser.parse_intermixed_args(argv)
    to_hf(args.src, args.dst, max_shard_bytes=int(args.max_shard_size * 1e9))


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of gigabytes")
    return value


_COMMANDS = {"from-hf": _from_hf, "to-hf": _to_hf}

if __name__ == "__main__":
    sys.exit(main())

"""The command `lmm`: ask about pictures and videos, chat."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lmm_jax import storage
from lmm_jax.config import KV_CACHES, QUANTIZATIONS, TEMPLATES
from lmm_jax.errors import UserError

if TYPE_CHECKING:
    from lmm_jax.inference.assistant import Assistant, Video

CHAT_HELP = """\
/image FILE   show a picture with the next question (several are possible)
/video FILE   show a video with the next question
/reset        forget everything
/help         this list
/quit         leave (also Ctrl-D)"""


def command() -> int:
    """`main` in a process of its own, where the garbage collector need not look through all of JAX again and again.

    `benchmarks/startup.py` measures it.
    """
    gc.set_threshold(20_000)  # new objects, not 700: tracing a model makes many, which stay
    status = main()
    gc.freeze()
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    args = _parser("eval" in words[:1]).parse_args(words)
    return run_command(lambda: args.run(args))


def run_command(command: Callable[[], None]) -> int:
    """Runs a command so that what a user did wrong is one sentence on standard error and status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character still shows the others
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        command()
        sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not storage.is_on_the_way(error):
            raise
        print(f"error: a bucket cannot be reached: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2


def _parser(evaluation: bool) -> argparse.ArgumentParser:
    """Of all commands; those of ``lmm eval`` only where they are wanted, since importing them takes time."""
    parser = argparse.ArgumentParser(prog="lmm", description="LLaVA-Mini: ask about pictures and videos.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('lmm-jax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="answer one question", description="Prints the answer as it is generated.")
    ask.add_argument("question", help="the question; may hold one <image> for each picture and video")
    ask.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    ask.add_argument("--video", metavar="FILE", help="a video")
    ask.add_argument("--start", type=float, metavar="SECONDS", help="where to begin in the video")
    ask.add_argument("--end", type=float, metavar="SECONDS", help="where to stop in the video")
    ask.add_argument("--fps", type=float, metavar="N", help="frames taken per second of video (1)")
    ask.add_argument("--json", action="store_true", help="print one JSON object: answer, finish_reason, tokens")
    _model_options(ask)
    _answer_options(ask)
    ask.set_defaults(run=_ask)

    chat = commands.add_parser(
        "chat",
        help="ask several questions in a row",
        description="A conversation; type\n\n" + CHAT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model_options(chat)
    _answer_options(chat)
    chat.set_defaults(run=_chat)

    serve = commands.add_parser(
        "serve", help="answer over HTTP", description="An API that OpenAI's clients speak, and a page to ask on."
    )
    from lmm_jax.serve.command import add_options

    add_options(serve)
    _model_options(serve)
    serve.set_defaults(run=_serve)

    from lmm_jax.analysis.command import add_parsers

    add_parsers(commands)
    if evaluation:
        from lmm_jax.evaluation.command import add_parser

        add_parser(commands)
    else:
        commands.add_parser("eval", help="run benchmarks")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR", help="a model folder, made by python -m conversion from-hf (the demo model)")
    model.add_argument("--mesh", metavar="SIZES", help="devices to use, as data=1,fsdp=8,tensor=1 (one device)")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic (by platform)")
    model.add_argument("--quantize", choices=QUANTIZATIONS, help="keep the decoder's weights in so many bits (no)")
    model.add_argument("--kv-cache", choices=KV_CACHES, help="keep the decoder's keys and values so (as computed)")
    model.add_argument("--template", choices=TEMPLATES, help="prompt template (the model's own)")


def _answer_options(parser: argparse.ArgumentParser) -> None:
    answer = parser.add_argument_group("answer")
    answer.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (512)")
    answer.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    answer.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1: off)")
    answer.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K best tokens (0: all)")
    answer.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}


def _serve(args: argparse.Namespace) -> None:
    from lmm_jax.serve.command import serve

    serve(args, lambda: _load_model(args))


def _load(args: argparse.Namespace) -> Assistant:
    # so many things are checked before seconds of imports and loading
    from lmm_jax.data.image import existing_file

    for file, kind in [*((f, "picture") for f in getattr(args, "image", [])), (getattr(args, "video", None), "video")]:
        if file and not (kind == "video" and os.path.isdir(file)):  # a folder of frames
            existing_file(file, kind)

    from lmm_jax.inference.sampling import Sampling

    Sampling(**_sampling(args))
    return _load_model(args)


def _load_model(args: argparse.Namespace) -> Assistant:
    if args.model is None:
        warnings.warn("without --model DIR the demo model answers, which knows coloured shapes only", stacklevel=2)
    from lmm_jax import load

    return load(args.model, mesh=args.mesh, dtype=args.dtype, quantize=args.quantize, kv_cache=args.kv_cache)


def _ask(args: argparse.Namespace) -> None:
    if not args.video and (args.start, args.end, args.fps) != (None, None, None):
        raise UserError("--start, --end and --fps choose frames of a video: give one with --video FILE")
    assistant = _load(args)
    from lmm_jax.inference.assistant import Conversation, Question

    question = Question(args.question, args.image, _video(args))
    asked = assistant.extend(Conversation(), question)
    if args.json:
        (answer,) = assistant.answers([asked], template=args.template, **_sampling(args))
        fields = {"answer": answer.text, "finish_reason": answer.finish_reason, "tokens": len(answer.token_ids)}
        print(json.dumps(fields, ensure_ascii=False))
    else:
        _print_pieces(assistant.stream_answer(asked, template=args.template, **_sampling(args)))


def _video(args: argparse.Namespace) -> Video | None:
    from lmm_jax.inference.assistant import Video

    fps = 1.0 if args.fps is None else args.fps
    return Video(args.video, args.start, args.end, fps) if args.video else None


def _print_pieces(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _chat(args: argparse.Namespace) -> None:
    assistant = _load(args)
    assistant.tokenizer  # noqa: B018  a model that cannot chat says so now
    chat, images, video = assistant.chat(args.template), [], None
    if sys.stdin.isatty():
        print(CHAT_HELP)
    while (line := _read_line()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/reset":
                chat, images, video = assistant.chat(args.template), [], None
            elif command == "/image":
                images.append(_shown(rest, "picture"))
            elif command == "/video":
                video = _shown(rest, "video")
            elif command.startswith("/"):
                print(CHAT_HELP)
            elif line.strip():
                shown, (images, video) = (images, video), ([], None)  # also of a turn that fails
                _print_pieces(chat.stream(line.strip(), *shown, **_sampling(args)))
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)  # a slip of one turn does not end the conversation
        except KeyboardInterrupt:
            print("\n(stopped: this turn is forgotten)")


def _shown(path: str, kind: str) -> str:
    from lmm_jax.data.image import existing_file, load_image

    if not path.strip():
        raise UserError(f"no {kind} was named: give its file after the command")
    path = existing_file(os.path.expanduser(path.strip()), kind)
    if kind == "picture":
        load_image(path, upright=True)
    return path


def _read_line() -> str | None:
    with contextlib.suppress(EOFError):
        return input("> " if sys.stdin.isatty() else "")
    return None

"""`lmm serve`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmm_jax.errors import UserError
from lmm_jax.serve import limits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lmm_jax.inference.assistant import Assistant

_KEY = "LMM_API_KEY"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_SWITCH_SECONDS = 0.0005  # of Python threads: when the device is done, the engine must not wait 5 ms for its turn


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the server; those of the model are the command line's own."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (8000)")
    parser.add_argument("--name", help="of the model, as clients see it (its folder's)")
    parser.add_argument("--api-key", metavar="KEY", help=f"that clients must send; better in the variable {_KEY} (none)")
    parser.add_argument("--allow-remote", action="store_true", help="fetch pictures and videos from http(s) URLs (no)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="name this server is reached by")
    parser.add_argument("--no-page", action="store_true", help="serve the API alone")
    parser.add_argument("--log-prompts", action="store_true", help="log questions and answers (no)")
    parser.add_argument("--drain-seconds", type=float, default=30.0, metavar="N", help="to finish answers on SIGTERM (30)")
    limits.add_options(parser)


def serve(args: argparse.Namespace, load: Callable[[], Assistant]) -> None:
    """Serves until it is told to stop (Ctrl-C, SIGTERM). Raises UserError where it cannot begin."""
    most = limits.from_options(args)
    if not 0 <= args.port < 65536:
        raise UserError(f"--port is {args.port}: expected 0 to 65535")
    if not args.drain_seconds >= 0:
        raise UserError(f"--drain-seconds is {args.drain_seconds}: expected 0 or more")
    key = args.api_key if args.api_key is not None else os.environ.get(_KEY)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise UserError("the API key must be of printable ASCII characters, without spaces at its ends, and not empty")
    try:
        import uvicorn  # noqa: F401

        from lmm_jax.serve import app, service
    except ImportError as error:
        raise UserError(f"serving needs more packages ({error.name}): pip install 'lmm-jax[serve]'") from error
    _allow_files(most.connections)
    listening = _listen(args.host, args.port)
    if args.host not in _LOCAL and key is None:
        warnings.warn(f"anyone who reaches {args.host} can ask: set {_KEY} to let in only who knows it", stacklevel=2)
    sys.setswitchinterval(_SWITCH_SECONDS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed then, too
    with listening, _folder() as folder:
        assistant = load()
        name = args.name or ("demo" if args.model is None else assistant.folder.name)
        asked_for = {"allows_remote": args.allow_remote, "logs_prompts": args.log_prompts}
        served = service.Service(assistant, most, folder, name=name, template=args.template, **asked_for)
        try:
            asyncio.run(served.warm_up())
        except BaseException:
            served.close(0)
            raise
        application = app.create(served, api_key=key, hosts=args.allow_host, drain_seconds=args.drain_seconds)
        closing = []
        if not args.no_page:
            from lmm_jax.serve import page

            application, close_pages = page.mount(application, served, key)
            closing.append(close_pages)
        _run(application, args, most, listening, closing)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """For all that is on the disk meanwhile, also what frameworks write for themselves; removed at the end."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="lmm-serve-") as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def _allow_files(connections: int) -> None:
    """As many open files as connections may need, where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * connections + 1024
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from error
    return listening


def _run(
    application: FastAPI,
    args: argparse.Namespace,
    most: limits.Limits,
    listening: socket.socket,
    closing: Sequence[Callable[[], None]],
) -> None:
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from lmm_jax.serve.guards import protocol

    host, port = listening.getsockname()[:2]
    if args.host in _LOCAL:  # a page from elsewhere must not reach this server by a name of its own (DNS rebinding)
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=[*_LOCAL, "[::1]", *args.allow_host])
    config = uvicorn.Config(
        application,
        http=protocol(most),
        ws="none",
        log_level="info",
        timeout_keep_alive=20,  # seconds; longer than clients keep theirs (5 to 15), or what they send would meet a closed one
        timeout_graceful_shutdown=max(1, round(args.drain_seconds)),
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for close in closing:  # open pages would hold it up until its time is over
                close()
            await super().shutdown(sockets)

    server = Server(config)
    print(f"listening on http://{'localhost' if host == '127.0.0.1' else host}:{port}", file=sys.stderr, flush=True)
    server.run(sockets=[listening])

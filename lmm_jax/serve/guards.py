"""What stands before every route: keys, limits of size, time and number."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmm_jax.serve import errors
from lmm_jax.serve.errors import RETRY_SECONDS, ApiError
from lmm_jax.serve.limits import Limits
from lmm_jax.serve.metrics import Metrics

_LOCKED = ("/v1/", "/metrics")
_QUEUED = "/v1/chat/completions"
_GRADIO = "/gradio_api/"
# what the page's own code asks for; the rest of what Gradio offers is not needed, and some of it reaches further than the page
_PAGE_ROUTES = ("run/predict", "queue/join", "queue/data", "cancel", "reset", "upload", "heartbeat/", "startup-events", "info")
_NOT_PAGE = ("/file=", "/file/", "/proxy=", "/monitoring", "/run-history")
_HEARTBEAT = f"{_GRADIO}heartbeat/"
PAGE_FOLDER = "page"
_UPLOADS = ("/v1/files", "/gradio_api/upload")


class Guard:
    """ASGI middleware."""

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, folder: Path, api_key: str | None, hosts: Sequence[str]
    ) -> None:
        """Stands before an application.

        Args:
          app: that.
          limits: of clients.
          metrics: count what is answered.
          folder: holds all that is uploaded, also by the page.
          api_key: that clients must send; None: nobody needs one.
          hosts: of web pages that may send something, beside this server's own.
        """
        self._folder, self._hosts = folder, hosts
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if api_key is None else api_key.encode()
        self._questions = 0  # requests that are answered or wait
        self._bytes = 0  # of bodies of requests that are under way
        self._uploading = 0  # bytes of uploads that are under way
        self._pages = 0  # that are open in browsers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # nothing here speaks WebSocket
        is_question = scope["path"] == _QUEUED and scope["method"] == "POST"
        body = _Body(self, scope, receive)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, message["status"]).inc()
            async with asyncio.timeout(self._limits.body_seconds):  # nobody holds a place by not reading
                await send(message)

        async def answer(message: Message) -> None:
            """What the application says, or what is wrong with the body that it could not read."""
            if body.error is None:
                await counted(message)
            elif message["type"] == "http.response.start":
                await _told(body.error)(scope, receive, counted)

        try:
            self._check(scope, is_question)
        except ApiError as error:
            await _told(error)(scope, receive, counted)
            return
        is_page = scope["path"].startswith(_HEARTBEAT)
        self._questions += is_question
        self._pages += is_page
        try:
            await self._app(scope, body.receive, answer)
        finally:
            self._questions -= is_question
            self._pages -= is_page
            self._bytes -= body.size
            self._uploading -= body.uploaded

    def _check(self, scope: Scope, is_question: bool) -> None:
        headers, limits = Headers(scope=scope), self._limits
        if self._key is not None and scope["path"].startswith(_LOCKED):
            given = headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")
        self._check_page(scope, headers)
        length = headers.get("content-length", "0")
        most = self.most(scope["path"])
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > most:
            raise _too_large(most)
        if scope["path"].startswith(_UPLOADS) and scope["method"] == "POST":
            self.upload(0, _size(self._folder))
        if is_question and self._questions >= limits.rows + limits.queue:
            raise ApiError(
                429,
                f"{self._questions} requests are answered or wait: try again later",
                code="queue_full",
                retry_after=RETRY_SECONDS,
            )

    def _check_page(self, scope: Scope, headers: Headers) -> None:
        """What a browser does: nothing for other servers' pages, and of Gradio's routes those that the page needs."""
        path, origin = scope["path"], headers.get("origin")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin is not None:
            parts = urlsplit(origin)
            if parts.netloc != headers.get("host") and parts.hostname not in self._hosts:
                raise ApiError(403, f"a page of {origin[:100]} may not use this server", code="foreign_page")
        if path.startswith(_GRADIO):
            name = path.removeprefix(_GRADIO)
            folder = f"file={self._folder / PAGE_FOLDER}/"
            is_file = name.startswith(folder) and ".." not in name
            if not (is_file or name.startswith(_PAGE_ROUTES)):
                raise ApiError(404, "there is nothing here")
        elif path.startswith(_NOT_PAGE):
            raise ApiError(404, "there is nothing here")
        if path.startswith(_HEARTBEAT) and self._pages >= self._limits.connections // 4:
            raise ApiError(429, "the page is open too often", code="pages_full", retry_after=RETRY_SECONDS)

    def upload(self, new: int, there: int) -> None:
        """Counts bytes of uploads, beside those that are there already."""
        self._uploading += new
        if self._uploading + there > 1e6 * self._limits.files_mb:
            message = f"all files together are larger than {self._limits.files_mb:g} MB: delete some, or try again later"
            raise ApiError(429, message, code="too_many_files", retry_after=RETRY_SECONDS)

    def most(self, path: str) -> float:
        """Bytes of a request to this path."""
        return 1e6 * (self._limits.file_mb + 1 if path.startswith(_UPLOADS) else self._limits.body_mb)

    def add(self, size: int) -> None:
        """Counts bytes that were read."""
        self._bytes += size
        if self._bytes > 1e6 * self._limits.bodies_mb:
            raise ApiError(429, "too much is sent at once: try again later", code="bodies_full", retry_after=RETRY_SECONDS)

    @property
    def body_seconds(self) -> float:
        """For a client to send a request."""
        return self._limits.body_seconds


class _Body:
    """The body of one request as it comes."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive) -> None:
        self._guard, self._receive = guard, receive
        self._is_upload = scope["path"].startswith(_UPLOADS)  # goes to the disk
        self._most = guard.most(scope["path"])
        self._until = time.monotonic() + guard.body_seconds
        self._total = 0
        self._is_complete = False
        self.size = self.uploaded = 0  # that is counted
        self.error: ApiError | None = None

    async def receive(self) -> Message:
        """The next message; ApiError where it is too late or too much, which is then also `error`."""
        if self._is_complete:
            return await self._receive()  # that the client leaves
        try:
            return await self._next()
        except ApiError as error:
            self.error = error
            raise

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(400, "the request took too long to arrive", code="request_too_slow") from None
        if message["type"] == "http.request":
            self._is_complete = not message.get("more_body")
            new = len(message.get("body", b""))
            self._total += new
            if self._total > self._most:
                raise _too_large(self._most)
            if self._is_upload:
                self.uploaded += new
                self._guard.upload(new, 0)
            else:
                self.size += new
                self._guard.add(new)
        return message


def _told(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers | {"Connection": "close"})


def _size(folder: Path) -> int:
    """Bytes of all files in a folder, also of those that vanish meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def _too_large(most: float) -> ApiError:
    return ApiError(413, f"the request is larger than {most / 1e6:g} MB", code="request_too_large")


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol; clients that do not send headers in time, and connections that are too many, are cut off."""

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(_FULL)
                transport.close()
            else:
                self._wait()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._wait()
            super().data_received(data)
            if self._timer is not None and self.cycle is not None and not self.cycle.response_complete:
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self.loop.call_later(limits.body_seconds, self.transport.abort)  # who does not read

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stuck is not None:
                self._stuck.cancel()
                self._stuck = None

        def _wait(self) -> None:
            self._timer = self.loop.call_later(limits.head_seconds, self.transport.close)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol


def _full() -> bytes:
    content = json.dumps(errors.body(429, "there are too many connections: try again later", "connections_full")).encode()
    head = (
        f"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        f"Retry-After: {RETRY_SECONDS}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


_FULL = _full()

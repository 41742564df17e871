"""Servers of the demo model, in the test's process, with real connections."""

import base64
import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

import lmm_jax
from lmm_jax.demo import examples
from lmm_jax.inference.assistant import Assistant
from lmm_jax.inference.engine import Engine
from lmm_jax.serve.limits import Limits


class Server:
    """A running one."""

    def __init__(self, service, port):
        self.service, self.port, self.url = service, port, f"http://127.0.0.1:{port}"

    def http(self, **settings):
        return httpx.Client(base_url=self.url, timeout=120, **settings)

    def openai(self, key="any"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, body, **settings):
        with self.http() as client:
            content, kind = json.dumps(body), {"Content-Type": "application/json"}
            return client.post("/v1/chat/completions", content=content, headers=kind, **settings)

    def is_idle(self):
        return not (self.service.live.running or self.service.live.waiting)


@contextlib.contextmanager
def running(assistant, folder, *, api_key=None, page=False, settings=None, **limits):
    """A server; `settings` of the service, `limits` as of `Limits`."""
    import uvicorn

    from lmm_jax.serve import app, guards
    from lmm_jax.serve.service import Service

    folder.mkdir()
    most = Limits(**limits)
    service = Service(assistant, most, folder, name="demo", **(settings or {}))
    application = app.create(service, api_key=api_key, drain_seconds=5)
    closing = []
    if page:
        from lmm_jax.serve.page import mount

        application, close_pages = mount(application, service, api_key)
        closing.append(close_pages)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application, http=guards.protocol(most), ws="none", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield Server(service, listening.getsockname()[1])
    finally:
        for close in closing:
            close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive() and not service.live.is_well


@pytest.fixture(scope="session")
def demo():
    """Makes the demo model with an engine of its own; weights are shared."""
    loaded = lmm_jax.load()

    def another(**settings):
        params, mesh, dtype = loaded.engine.params, loaded.engine.mesh, loaded.engine.dtype
        return Assistant(loaded.folder, loaded.config, Engine(loaded.config, params, mesh, dtype=dtype, **settings))

    return another


@pytest.fixture(scope="session")
def server(demo, tmp_path_factory):
    """One with usual limits, which other tests use, too."""
    with running(demo(), tmp_path_factory.mktemp("server") / "files") as server:
        yield server


@pytest.fixture
def start(demo, tmp_path):
    """Limits and settings -> a server, closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(demo(), tmp_path / "files", **settings))


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """The example picture and clip as files."""
    folder: Path = tmp_path_factory.mktemp("media")
    examples.picture().save(folder / "shapes.png")
    (folder / "moving.mp4").write_bytes(examples.clip())
    return folder


def data_url(file, kind):
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


@pytest.fixture(scope="session")
def picture(media):
    """The example picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(media / "shapes.png", "image/png")}}


@pytest.fixture(scope="session")
def video(media):
    """The example clip as a part of a message."""
    return {"type": "video_url", "video_url": {"url": data_url(media / "moving.mp4", "video/mp4")}}


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def head(length):
    """The headers of a question of so many bytes."""
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)

"""Keys and limits: each is a clear 4xx, and the server goes on."""

import contextlib
import json
import os
import socket
import threading

import httpx
import openai
import pytest
from serve.conftest import head, until, user

from lmm_jax.errors import UserError
from lmm_jax.serve.limits import Limits

LONG = {"messages": [{"role": "user", "content": "Describe it."}], "ignore_eos": True, "max_tokens": 4096}
SHORT = {"messages": [{"role": "user", "content": "What is red?"}], "max_tokens": 2}


def error(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_the_key_is_needed_and_nothing_else_will_do(start, picture):
    server = start(api_key="s3cret")
    with server.http() as client:
        for path in ("/v1/models", "/v1/files", "/metrics"):
            assert error(client.get(path), 401)["code"] == "invalid_api_key"
            for wrong in ("Bearer", "Bearer s3cre", "Bearer s3cret ", "s3cret", "bearer s3cret", "Bearer s3crets"):
                if wrong != "Bearer s3cret ":  # HTTP takes spaces at the end away
                    error(client.get(path, headers={"Authorization": wrong}), 401)
        assert client.get("/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.openai("other").models.list()
    done = server.openai("s3cret").chat.completions.create(model="demo", messages=[user("What is red?", picture)])
    assert done.choices[0].message.content


def test_more_than_the_queue_holds_is_told_when_to_come_back(start):
    server = start(rows=1, queue=1)
    threads = [threading.Thread(target=server.post, args=(LONG | {"timeout": 2},)) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: server.service.live.running and server.service.live.waiting)
    response = server.post(SHORT)
    assert error(response, 429)["code"] == "queue_full" and int(response.headers["retry-after"]) > 0
    for thread in threads:
        thread.join()
    assert server.post(SHORT).status_code == 200


def test_deadlines(start):
    server = start(deadline=1.0)
    for body in (LONG, LONG | {"timeout": 0.2}):
        assert error(server.post(body), 400)["code"] == "deadline_exceeded"
    stream = server.post(LONG | {"stream": True}).text.strip().split("\n\n")
    assert json.loads(stream[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert server.post(SHORT | {"timeout": 3600}).status_code == 200
    until(server.is_idle)


def test_sizes(start, picture, video, media):
    server = start(
        body_mb=0.05, image_pixels=100, images=1, videos=1, frames=2, file_mb=0.02, files=2, prompt_tokens=40, new_tokens=8
    )
    assert "0.05 MB" in error(server.post(SHORT | {"user": "x" * 60_000}), 413)["message"]

    def pieces():
        for _ in range(100):
            yield b" " * 1000

    with server.http() as client:
        assert error(client.post("/v1/chat/completions", content=pieces()), 413)["code"] == "request_too_large"
        assert "0.02 MB" in error(client.post("/v1/files", files={"file": b"x" * 30_000}), 413)["message"]
        for _ in range(2):
            assert client.post("/v1/files", files={"file": b"x" * 10}).status_code == 200
        assert error(client.post("/v1/files", files={"file": b"x" * 10}), 429)["code"] == "too_many_files"
    assert "100 pixels" in error(server.post({"messages": [user("?", picture)]}), 400)["message"]
    assert "2 pictures" in error(server.post({"messages": [user("?", picture, picture)]}), 400)["message"]
    assert "2 videos" in error(server.post({"messages": [user("?", video, video)]}), 400)["message"]
    text, clip = (server.post({"messages": [user("?", *of)], "max_tokens": 2}).json()["usage"] for of in ((), (video,)))
    assert clip["prompt_tokens"] == text["prompt_tokens"] + 3  # a newline and two frames
    long = {"messages": [{"role": "user", "content": "word " * 60}]}
    assert error(server.post(long), 400)["code"] == "context_length_exceeded"
    assert (
        error(server.post({"messages": [{"role": "user", "content": "w" * 5000}]}), 400)["code"] == "context_length_exceeded"
    )
    assert "at most 8" in error(server.post(SHORT | {"max_tokens": 9}), 400)["message"]
    assert len(os.listdir(server.service.media._folder)) == 0


def test_slow_clients_are_cut_off_and_hold_up_nobody(start):
    server = start(head_seconds=2.0, body_seconds=3.0, connections=40)
    with contextlib.ExitStack() as stack:
        silent, slow, half = (
            [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(10)] for _ in range(3)
        )
        for client in slow:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        for client in half:
            client.sendall(head(1000) + b'{"messages"')
        assert server.post(SHORT).status_code == 200
        for client in (*silent, *slow):
            client.settimeout(60)
            assert client.recv(1000) == b""
        for client in half:
            client.settimeout(60)
            assert b"request_too_slow" in receive(client)
    until(lambda: not server.service.live.running)
    assert server.post(SHORT).status_code == 200


def receive(client):
    got = b""
    while piece := client.recv(65536):
        got += piece
    return got


def test_too_many_connections(start):
    server = start(connections=5)
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(5)]
        with socket.create_connection(("127.0.0.1", server.port)) as one_more:
            one_more.settimeout(60)
            got = receive(one_more)
            assert b"429" in got and b"connections_full" in got
        assert open_ones
    until(lambda: works(server))


def works(server):
    """Whether it answers; connections that were closed may count for a moment."""
    try:
        return server.post(SHORT).status_code == 200
    except httpx.TransportError:
        return False


def test_limits_must_be_positive():
    with pytest.raises(UserError, match="--max-rows is 0"):
        Limits(rows=0)
    with pytest.raises(UserError, match="--max-deadline is inf"):
        Limits(deadline=float("inf"))

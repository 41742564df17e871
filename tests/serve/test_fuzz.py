"""Whatever is sent, the server goes on serving: no 5xx, no memory or file handle that stays."""

import gc
import json
import os
import random
import socket
import warnings

import psutil
import pytest
from serve.conftest import data_url, head, running, until, user

ALLOWED = {"name", "messages", "model", "stream", "n", "stop", "seed", "max_tokens", "temperature", "top_p", "top_k"}


def mutated(content, random):
    """A file with some of its bytes changed, cut out, repeated or cut off."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 4, 40))):
        at, size = random.randrange(len(content)), random.choice((1, 2, 4, 64))
        match random.randrange(4):
            case 0:
                content[at : at + size] = random.randbytes(size)
            case 1:
                del content[at : at + size]
            case 2:
                content[at:at] = content[at : at + size]
            case 3:
                del content[max(at, 16) :]
        content = content or bytearray(b"x")
    return bytes(content)


def ask_random(client, random, media):
    """A question with a mutated picture or clip, by data URL or upload; its status."""
    name, kind, part = random.choice((("shapes.png", "image/png", "image_url"), ("moving.mp4", "video/mp4", "video_url")))
    content = mutated((media / name).read_bytes(), random)
    if random.random() < 0.3:
        uploaded = client.post("/v1/files", files={"file": (name, content)})
        assert uploaded.status_code == 200
        source = {"file_id": uploaded.json()["id"]}
    else:
        (media / "mutated").write_bytes(content)
        source = {"url": data_url(media / "mutated", kind)}
    body = {"messages": [user("What?", {"type": part, part: source})], "max_tokens": 2}
    status = client.post("/v1/chat/completions", json=body).status_code
    if "file_id" in source:
        assert client.delete(f"/v1/files/{source['file_id']}").status_code in (200, 404)  # it may be past its time
    return status


def used():
    gc.collect()
    here = psutil.Process()
    return here.memory_info().rss / 1e6, here.num_fds(), len(here.children(recursive=True))


def goes_on(server):
    until(server.is_idle)
    done = server.post({"messages": [{"role": "user", "content": "What is red?"}], "max_tokens": 2})
    assert done.status_code == 200, done.text


def test_mutated_media(server, media):
    random_of = random.Random(1)
    with server.http() as client:
        statuses = [ask_random(client, random_of, media) for _ in range(40)]
    assert set(statuses) <= {200, 400} and 400 in statuses
    assert os.listdir(server.service.media._folder) == []
    goes_on(server)


def random_body(random_of, picture):
    """Anything from noise to a nearly right question."""
    match random_of.randrange(4):
        case 0:
            return random_of.randbytes(random_of.randrange(300))
        case 1:
            whole = json.dumps({"messages": [user("What?", picture)], "max_tokens": 1}).encode()
            return mutated(whole, random_of)
        case 2:
            return b"[{" * random_of.randrange(2000)
        case _:
            values = [None, -1, 0, 1e999, "", "x" * 100, [], {}, [[]], True, "\ud800", {"type": "image_url"}, [user()]]
            return json.dumps({key: random_of.choice(values) for key in ALLOWED}).encode()


def bombard(server, picture, count, seed=0):
    random_of, statuses = random.Random(seed), []
    with server.http() as client:
        for _ in range(count):
            body = random_body(random_of, picture)
            path = random_of.choice(("/v1/chat/completions", "/v1/chat/completions", "/v1/files", "/v1/models", "/nowhere"))
            kind = random_of.choice(("application/json", "application/json", "multipart/form-data; boundary=x", "text/x"))
            statuses.append(client.post(path, content=body, headers={"Content-Type": kind}).status_code)
    return statuses


def test_random_bodies(server, picture):
    assert max(bombard(server, picture, 300)) < 500
    goes_on(server)


def test_random_bytes_instead_of_http(server):
    random_of = random.Random(2)
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(random_of.choice((b"", b"GET ", head(10))) + random_of.randbytes(random_of.randrange(2000)))
    goes_on(server)


@pytest.mark.slow
def test_nothing_stays_after_thousands_of_attacks(demo, tmp_path, media, picture):
    """10,000 random bodies and 500 mutated files, by a server that remembers no pictures."""
    with running(demo(prefix_cache_bytes=0), tmp_path / "files", file_seconds=1.0) as server:
        check_what_stays(server, media, picture)


def check_what_stays(server, media, picture):
    random_of = random.Random(3)

    def attack(bodies, files, seed):
        assert max(bombard(server, picture, bodies, seed)) < 500
        with server.http() as client:
            assert {ask_random(client, random_of, media) for _ in range(files)} <= {200, 400, 404}
        goes_on(server)

    attack(1000, 100, 0)
    memory, handles, processes = used()
    for seed in range(1, 10):
        attack(1000, 45, seed)
    after = used()
    assert after[0] < memory + 60 and after[1] <= handles + 2 and after[2] <= processes, (memory, handles, processes, after)


@pytest.mark.slow
def test_whatever_fits_the_schema(server):
    """Requests made from the schema that the server gives, and all but right ones."""
    import hypothesis
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @hypothesis.settings(
            max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
        )
        @hypothesis.given(case=strategy)
        def fuzz(case):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.call_and_validate(base_url=server.url, checks=checks, timeout=60)

        fuzz()
    goes_on(server)

"""`lmm serve` as a process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

import lmm_jax
from lmm_jax.cli import main
from lmm_jax.serve import command

ROOT = Path(__file__).parent.parent.parent
RUN = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}


def post(url, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.fixture
def server(tmp_path):
    """The process, what it said, and its URL."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "lmm_jax", "serve", "--port", "0", "--no-page", "--drain-seconds", "60"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = ""
            while "startup complete" not in said:
                said += server.stderr.readline()
                assert server.poll() is None, said
            yield server, said, re.search(r"http://localhost:\d+", said)[0]
        finally:
            server.kill()


def test_it_serves_finishes_what_runs_and_leaves_nothing(server, tmp_path):
    process, said, url = server
    secret = "What is a circle of secrets?"
    assert post(url, {"messages": [{"role": "user", "content": secret}], "max_tokens": 4})["choices"]
    model, clip = lmm_jax.load(), str(ROOT / "examples" / "moving.mp4")
    asked = [model.ask(question, video=clip) for question in ("Which way does the circle move?", "What turns green?")]
    assert snippets(url) == ["red", "red", *asked]
    got = []
    long = {"messages": [{"role": "user", "content": secret}], "max_tokens": 300, "ignore_eos": True}
    asking = threading.Thread(target=lambda: got.append(post(url, long)))
    asking.start()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    asking.join()
    said += process.stderr.read()
    assert process.wait(60) == 143, said
    assert got[0]["usage"]["completion_tokens"] == 300
    assert list(tmp_path.iterdir()) == []
    assert secret not in said and "Traceback" not in said


def snippets(url):
    """What the README's and the docs' commands answer."""
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/serving.md")]
    answers = []
    for page in pages:
        (curl,) = re.findall(r"^curl .*?(?=```)", page, re.M | re.S)
        done = subprocess.run(["bash", "-ec", curl.replace("http://", "").replace("localhost:8000", url)], **RUN)
        answers.append(json.loads(done.stdout)["choices"][0]["message"]["content"])
    (client,) = re.findall(r"^```py\n(.*?)^```", pages[1], re.M | re.S)
    done = subprocess.run([sys.executable, "-c", client.replace("http://localhost:8000", url)], **RUN)
    return answers + done.stdout.split("\n")[:-1]


def test_the_key_may_be_in_the_environment(monkeypatch, capsys):
    from lmm_jax.errors import UserError
    from lmm_jax.serve import service

    def began(*args, **settings):
        raise UserError("far enough")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(service, "Service", began)
    monkeypatch.setenv("LMM_API_KEY", "naïve")
    assert main(["serve", "--port", "0"]) == 2 and "ASCII" in capsys.readouterr().err
    monkeypatch.setenv("LMM_API_KEY", "s3cret")
    assert main(["serve", "--port", "0"]) == 2 and "far enough" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, word",
    [
        (["--port", "99999"], "0 to 65535"),
        (["--max-rows", "0"], "--max-rows is 0"),
        (["--api-key", ""], "API key"),
        (["--api-key", "naïve"], "ASCII"),
        (["--host", "nobody.invalid"], "cannot listen"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_it_cannot_begin_with(capsys, options, word, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["serve", "--port", "0", *options]) == 2
    error = capsys.readouterr().err
    assert word in error and "Traceback" not in error


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --host or --port" in capsys.readouterr().err


def test_packages_that_are_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--port", "0"]) == 2
    assert "pip install 'lmm-jax[serve]'" in capsys.readouterr().err


def test_only_this_machine_unless_told_otherwise():
    import argparse

    parser = argparse.ArgumentParser()
    command.add_options(parser)
    assert parser.parse_args([]).host == "127.0.0.1" and not parser.parse_args([]).allow_remote

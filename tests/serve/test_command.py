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

from lmm_jax.cli import main
from lmm_jax.serve import command


def post(url, body, key=None):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_it_serves_finishes_what_runs_and_leaves_nothing(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "LMM_API_KEY": "s3cret", "XLA_FLAGS": ""}
    arguments = ["serve", "--port", "0", "--no-page", "--drain-seconds", "60"]
    with subprocess.Popen(
        [sys.executable, "-m", "lmm_jax", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        said = []
        while not any("startup complete" in line for line in said):
            said.append(server.stderr.readline())
            assert said[-1], "".join(said)
        (url,) = re.findall(r"http://localhost:\d+", "".join(said))
        secret = "What is a circle of secrets?"
        assert post(url, {"messages": [{"role": "user", "content": secret}], "max_tokens": 4}, "s3cret")["choices"]
        got = []
        long = {"messages": [{"role": "user", "content": secret}], "max_tokens": 300, "ignore_eos": True}
        asking = threading.Thread(target=lambda: got.append(post(url, long, "s3cret")))
        asking.start()
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        asking.join()
        rest = server.stderr.read()
    assert server.returncode == 143, rest
    assert got[0]["usage"]["completion_tokens"] == 300
    assert list(Path(tmp_path).iterdir()) == []
    assert secret not in "".join(said) + rest and "Traceback" not in rest


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

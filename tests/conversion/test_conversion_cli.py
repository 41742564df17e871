import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from crafting import GOLDEN, checkpoint, load, same

from conversion.__main__ import main
from conversion.names import Entry
from lmm_jax.checkpoint import read_config


def test_there_and_back(tmp_path, capsys):
    model, back = str(tmp_path / "model"), str(tmp_path / "back")
    assert main(["from-hf", str(GOLDEN / "image_c1/hf"), "--template", "plain", model]) == 0
    assert "wrote" in capsys.readouterr().out
    assert read_config(model).template == "plain"
    assert main(["to-hf", model, "--max-shard-size", "0.0005", back]) == 0
    assert same(load(tmp_path / "back"), load(GOLDEN / "image_c1/hf"))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1


def test_composing(tmp_path, capsys):
    tensors = load(GOLDEN / "llava_v1_5/hf")
    llm = {n: t for n, t in tensors.items() if "mm_projector" not in n and "vision_tower" not in n}
    hf = checkpoint(tmp_path, llm, "llava_v1_5", model_type="llama")
    arguments = ["from-hf", "--llm", str(hf), "--vision", str(tmp_path / "clip"), str(tmp_path / "model"), "--seed", "1"]
    assert main(arguments) == 0
    assert read_config(tmp_path / "model").compressor is None
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["from-hf", str(GOLDEN / "image_c1/hf")],
        ["from-hf", "a", "b", "c"],
        ["from-hf", "--llm", "a", "b"],
        ["from-hf", "--llm", "a", "--vision", "b", "c", "d"],
        ["from-hf", "a", "b", "--template", "none"],
        ["to-hf", "a"],
        ["to-hf", "a", "b", "--max-shard-size", "0"],
        ["to-hf", "a", "b", "--max-shard-size", "five"],
        ["somewhere", "a", "b"],
        [],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["from-hf", "--help"], ["to-hf", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_bad_input_is_one_sentence_and_status_2(tmp_path):
    """In a process of its own, where a traceback would show."""
    hf = checkpoint(tmp_path, load(GOLDEN / "image_c1/hf") | {"extra": np.ones(3, np.float32)})
    command = [sys.executable, "-m", "conversion", "from-hf", str(hf), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "unknown (1): extra" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "hf"]


def test_ctrl_c_leaves_nothing(tmp_path):
    """Interrupted while it reads config.json, which is a pipe here that nobody writes to."""
    hf = checkpoint(tmp_path, load(GOLDEN / "image_c1/hf"))
    (hf / "config.json").unlink()
    os.mkfifo(hf / "config.json")
    command = [sys.executable, "-m", "conversion", "from-hf", str(hf), str(tmp_path / "model")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        pipe = wait_for_reader(hf / "config.json")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        os.close(pipe)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr == "interrupted: nothing was written\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "hf"]


def wait_for_reader(fifo):
    """Opens a named pipe for writing as soon as somebody reads it."""
    for _ in range(600):
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(fifo)


@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_an_interruption_while_writing_leaves_nothing(tmp_path, monkeypatch, capsys, command):
    hf, model = str(GOLDEN / "image_c1/hf"), tmp_path / "model"
    if command == "to-hf":
        assert main(["from-hf", hf, str(model)]) == 0
    before = sorted(tmp_path.iterdir())
    calls = []

    def interrupt(original):
        def method(*args):
            calls.append(1)
            if len(calls) > 60:
                raise KeyboardInterrupt
            return original(*args)

        return method

    monkeypatch.setattr(Entry, "leaf", interrupt(Entry.leaf))
    monkeypatch.setattr(Entry, "join", interrupt(Entry.join))
    source = hf if command == "from-hf" else str(model)
    assert main([command, source, str(tmp_path / "dst")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before

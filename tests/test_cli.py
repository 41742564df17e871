"""The command line: answers, and one sentence with status 2 for whatever is wrong."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import CASES, GOLDEN, slow

import lmm_jax
from lmm_jax.cli import main
from lmm_jax.data.conversation import render
from lmm_jax.data.image import normalize
from lmm_jax.inference.assistant import Conversation, Question

CLIP = str(GOLDEN.parents[1] / "examples" / "moving.mp4")
PICTURE = str(GOLDEN / "preprocessing" / "odd.png")


@pytest.fixture
def model(tiny):
    return str(tiny("tiny"))


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_ask_prints_the_answer(capsys, model):
    status, out, err = run(capsys, "ask", "--model", model, "--image", PICTURE, "--max-new-tokens", 8, "What is it?")
    assert (status, err) == (0, "")
    assert out.strip() == lmm_jax.load(model).ask("What is it?", [PICTURE], max_new_tokens=8)


@pytest.mark.parametrize("case", [CASES[0], *slow(*CASES[1:])])
def test_a_converted_checkpoint_answers_as_its_arrays_say(capsys, converted, case, tmp_path):
    """The same prompt and pixels through the command and through `generate`."""
    loaded = lmm_jax.load(converted(case))
    asked = loaded.extend(Conversation(), Question("What is it?", [PICTURE]))
    spans = render(asked.messages, loaded.config.template, loaded.tokenizer, generate=True)
    ids, _ = loaded.tokenizer.encode(spans)
    pixels = np.moveaxis(normalize(asked.media[0]), -1, 1)[None]
    tokens = loaded.generate(ids[None], None, pixels, max_new_tokens=8)[0]
    expected = loaded.tokenizer.decode(tokens[tokens >= 0]).strip()
    status, out, _ = run(capsys, "ask", "--model", converted(case), "--image", PICTURE, "--max-new-tokens", 8, "What is it?")
    assert status == 0 and out.strip() == expected
    video = ["--video", CLIP, "--fps", 2, "--start", 1, "--end", 4, "--json"]
    status, out, err = run(capsys, "ask", "--model", converted(case), *video, "--max-new-tokens", 4, "What moves?")
    assert (status, err) == (0, "") and json.loads(out)["tokens"] >= 1


def test_ask_in_json(capsys, model):
    arguments = ["--image", PICTURE, "--image", PICTURE, "--max-new-tokens", 5, "--json", "--mesh", "tensor=2"]
    status, out, _ = run(capsys, "ask", "--model", model, *arguments, "Compare.")
    answer = json.loads(out)
    assert status == 0 and answer["tokens"] == 5 and answer["finish_reason"] == "length"
    assert answer["answer"] == lmm_jax.load(model).ask("Compare.", [PICTURE, PICTURE], max_new_tokens=5)


def test_chat(capsys, model, monkeypatch):
    lines = [f"/image {PICTURE}", "What is it?", "And now?", "/reset", "Hello?", "/help", "", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    status, out, err = run(capsys, "chat", "--model", model, "--max-new-tokens", 6)
    assert (status, err) == (0, "")
    chat = lmm_jax.load(model).chat()
    first, second = chat.ask("What is it?", [PICTURE], max_new_tokens=6), chat.ask("And now?", max_new_tokens=6)
    third = lmm_jax.load(model).ask("Hello?", max_new_tokens=6)
    printed = out.split("/image FILE")[0].rstrip().split("\n")
    assert [line.strip() for line in printed] == [first, second, third]


def damaged(folder, kind):
    """A model folder that is not one any more."""
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "broken config":
        (folder / "config.json").write_text('{"format": "lmm-jax", ')
    elif kind == "newer config":
        (folder / "config.json").write_text('{"format": "lmm-jax", "version": 99}')
    elif kind == "no weights":
        shutil.rmtree(folder / "params")
    else:
        largest = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(largest.read_bytes())
        if kind == "truncated weights":
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 0x55
        largest.write_bytes(data)


@pytest.mark.parametrize(
    "kind", ["no config", "broken config", "newer config", "no weights", "truncated weights", "corrupted weights"]
)
def test_damaged_model_folder(capsys, model, tmp_path, kind):
    folder = shutil.copytree(model, tmp_path / "model")
    damaged(folder, kind)
    check_refused(*run(capsys, "ask", "--model", folder, "Hi"), str(folder))


def bad_media(folder):
    """Name -> a file that is no good as a picture or a video."""
    files = {
        n: folder / n
        for n in ("missing.png", "empty.png", "text.png", "cut.png", "bomb.png", "bomb.gif", "text.mp4", "cut.mp4")
    }
    good = (GOLDEN / "preprocessing" / "odd.png").read_bytes()
    files["empty.png"].write_bytes(b"")
    files["text.png"].write_text("no picture")
    files["cut.png"].write_bytes(good[: len(good) // 2])
    Image.new("1", (30000, 30000)).save(files["bomb.png"])
    header = bytearray(b"GIF89a\xff\xff\xff\xff\x80\x00\x00" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;")
    files["bomb.gif"].write_bytes(header)
    files["text.mp4"].write_text("no video")
    files["cut.mp4"].write_bytes(np.random.default_rng(0).bytes(2000))
    return files


@pytest.mark.parametrize(
    "name", ["missing.png", "empty.png", "text.png", "cut.png", "bomb.png", "bomb.gif", "text.mp4", "cut.mp4"]
)
def test_bad_media(capsys, model, tmp_path, name):
    path = bad_media(tmp_path)[name]
    option = "--video" if name.endswith("mp4") else "--image"
    check_refused(*run(capsys, "ask", "--model", model, option, path, "Hi"), name)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--model", "no/such/folder", "Hi"], "no/such/folder"),
        (["--model", str(GOLDEN / "image_c1" / "hf"), "Hi"], "python -m conversion from-hf"),
        (["--model", "MODEL", "--mesh", "tensor=16", "Hi"], "16 devices"),
        (["--model", "MODEL", "--mesh", "rows=2", "Hi"], "data=2,fsdp=2,tensor=2"),
        (["--model", "MODEL", "word " * 3000], "context is 2048"),
        (["--model", "MODEL", "What is <image>?"], "placeholder"),
        (["--model", "MODEL", "--image", PICTURE, "<image> and <image>"], "placeholder"),
        (["--model", "MODEL", "--temperature", "-1", "Hi"], "temperature"),
        (["--model", "MODEL", "--max-new-tokens", "0", "Hi"], "max_new_tokens"),
        (["--model", "MODEL", "--start", "3", "Hi"], "--video"),
        (["--model", "MODEL", "--fps", "3", "Hi"], "--video"),
        (["--model", "MODEL", "--top-k", "3000000000", "Hi"], "top_k"),
        (["--model", "MODEL", "a\udcffb"], "UTF-8"),
        (["--model", "MODEL", "--template", "llava_llama_3_1", "Hi"], "template"),
    ],
)
def test_bad_arguments(capsys, model, arguments, words):
    check_refused(*run(capsys, "ask", *[model if a == "MODEL" else a for a in arguments]), words)


def check_refused(status, out, err, words):
    assert status == 2 and out == ""
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert words in err


def test_a_slip_in_a_chat_that_is_typed_does_not_end_it(capsys, model, monkeypatch, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no video")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"/image nothing.png\n/image\n/video {text}\nWhat?\nHello?\n"))
    status, out, err = run(capsys, "chat", "--model", model, "--max-new-tokens", 3)
    assert status == 0 and "nothing.png does not exist" in err and "no picture was named" in err and "text.mp4" in err
    assert lmm_jax.load(model).ask("Hello?", max_new_tokens=3) in out


def test_a_slip_in_a_chat_from_a_file_ends_it(capsys, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/video nothing.mp4\nHello?\n"))
    check_refused(*run(capsys, "chat", "--model", model), "nothing.mp4")


def test_the_installed_command(model):
    command = [sys.executable, "-m", "lmm_jax", "ask", "--model", model, "--max-new-tokens", "8"]
    good = subprocess.run([*command, "Hi"], capture_output=True, text=True)
    assert good.returncode == 0 and good.stderr == "" and good.stdout.strip()
    bad = subprocess.run([*command, "--image", "no.png", "Hi"], capture_output=True, text=True)
    check_refused(bad.returncode, bad.stdout, bad.stderr, "no.png")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("lmm 0.")

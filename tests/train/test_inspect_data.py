"""What `inspect-data` says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmm_jax.config import named_sizes
from lmm_jax.data.tokenize import Tokenizer
from train.__main__ import main
from train.config import DataConfig, SourceConfig, StartConfig, TrainConfig
from train.inspect_data import inspect, marked

TEXT = Path(__file__).parents[1] / "golden" / "text"
GOLDEN = json.loads((TEXT / "conversations.json").read_text("utf-8"))["training"]


@pytest.fixture(scope="module")
def vicuna():
    return Tokenizer.load(TEXT / "vicuna_tokenizer")


@pytest.fixture
def report(tmp_path, vicuna):
    """Records of a file, settings of `inspect` -> all that is printed."""

    def run(records, max_skipped=0.01, **settings):
        (tmp_path / "a.json").write_text(json.dumps(records))
        data = DataConfig(sources=(SourceConfig(str(tmp_path / "a.json")),), batch_size=4, max_skipped=max_skipped)
        lines = []
        config = TrainConfig(folder=str(tmp_path / "run"), start=StartConfig(folder="model"), data=data)
        inspect(config, named_sizes()["tiny"], vicuna, print=lines.append, **settings)
        return "\n".join(lines)

    return run


def records(tmp_path, count=6):
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(tmp_path / "ok.png")
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A red cat."}]
    pictures = [{"id": f"p{i}", "image": "ok.png", "conversations": turns} for i in range(count)]
    text = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    return [*pictures, text, {"id": "gone", "image": "gone.png", "conversations": turns}, {"id": "bad", "conversations": []}]


def test_the_report(report, tmp_path):
    text = report(records(tmp_path))
    (row,) = [line for line in text.splitlines() if line.startswith(str(tmp_path / "a.json"))]
    assert row.split()[1:] == ["all", "9", "9", "7", "0", "1", "1"]
    assert "Skipped beforehand: 1 of 9 records (11.11%)" in text and "a run would stop" in text
    assert "1  empty conversation" in text and f"record 8 (bad) of {tmp_path / 'a.json'}" in text
    assert "3 steps an epoch, 3 in 1 epoch(s), of 4 rows each" in text and "2 shapes of batches" in text
    shapes = [line.split() for line in text.splitlines() if line[:1].isdigit() and len(line.split()) == 6]
    assert shapes == [["0", "128", "1", "16", "1", "1"], ["1", "128", "96", "16", "7", "2"]]
    bars = [line for line in text.splitlines() if "█" in line]
    assert sum(int(line.split()[-1]) for line in bars) == 8
    assert "Media of 7 records were read: 1 cannot be" in text and "1  picture missing" in text
    assert f"record 7 (gone) of {tmp_path / 'a.json'}: {tmp_path / 'gone.png'}" in text
    assert "ASSISTANT:⟦ A red cat.</s>⟧" in text and "ASSISTANT:⟦ Hello</s>⟧" in text  # one of every kind
    assert f"    {tmp_path / 'ok.png'}" in text and "USER: <image> \nWhat is it?" in text


def test_what_is_asked_for_is_done(report, tmp_path):
    text = report(records(tmp_path), max_skipped=0.2, samples=0, media=0)
    assert "a run would stop" not in text and "Media of 0 records were read: 0" in text and "⟦" not in text
    assert report(records(tmp_path), samples=5, media=3).count("--- record") == 5


def test_the_command(tmp_path, capsys):
    """From a configuration file; words of its own beside those of the configuration."""
    (tmp_path / "a.json").write_text(json.dumps(records(tmp_path)))
    source, start = f"SourceConfig({str(tmp_path / 'a.json')!r})", "StartConfig(scratch=named_sizes()['tiny'], tokenizer=TEXT)"
    (tmp_path / "run.py").write_text(
        f"from lmm_jax.config import named_sizes\nfrom train.config import *\nTEXT = {str(TEXT / 'vicuna_tokenizer')!r}\n"
        f"def get_config():\n    return TrainConfig({str(tmp_path / 'run')!r}, {start}, DataConfig(sources=({source},)))\n"
    )
    words = ["inspect-data", "--samples", "1", str(tmp_path / "run.py"), "--data.batch-size", "4", "--media", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "of 4 rows each" in out and out.count("--- record") == 1 and "Media of 2 records were read" in out
    for bad, message in ((["--media", "-1", "x.py"], "from 0 on"), (["--samples", "3"], "there is no configuration")):
        assert main(["inspect-data", *bad]) == 2
        assert message in capsys.readouterr().err


def test_no_model_is_built(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmm_jax.models.llava_mini", None)
    monkeypatch.setitem(sys.modules, "lmm_jax.checkpoint", None)
    assert report(records(tmp_path))


@pytest.mark.parametrize("name, template", [("v1/image_three_turns", "vicuna"), ("llava_llama_3_1/unicode", "llama3")])
def test_what_is_learnt_is_marked(name, template):
    entry = GOLDEN[name]
    text = marked(np.array(entry["input_ids"]), np.array(entry["labels"]), Tokenizer.load(TEXT / f"{template}_tokenizer"))
    learnt = [part.split("⟧")[0] for part in text.split("⟦")[1:]]
    end = {"vicuna": "</s>", "llama3": "<|eot_id|>"}[template]
    assert [part.strip() for part in learnt] == [t["value"] + end for t in entry["conversations"] if t["from"] == "gpt"]
    assert text.count("<image>") == 1

"""The demo model that comes with the package."""

import json
from pathlib import Path

import pytest
from support import slow

import lmm_jax
from lmm_jax.cli import main
from lmm_jax.demo import MODEL
from lmm_jax.demo.dataset import write_test_set
from lmm_jax.inference.assistant import Question

PICTURE, CLIP = (str(Path(__file__).parents[2] / "examples" / name) for name in ("shapes.png", "moving.mp4"))


def test_it_is_small():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 8e6
    assert {"tokenizer.json", "config.json"} <= {f.name for f in MODEL.iterdir()}


@pytest.mark.parametrize("medium,least", slow(("image", 0.85), ("video", 0.6)))
def test_it_answers_what_it_has_not_seen(tmp_path, medium, least):
    """The whole measurement is `benchmarks/demo_accuracy.py`; here a part that chance alone does not make fail."""
    numbers = {"images": 20, "clips": 0} if medium == "image" else {"images": 0, "clips": 40}
    write_test_set(tmp_path, **numbers, seed=31)
    records = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    media = [([str(tmp_path / r["image"])], None) if medium == "image" else ([], str(tmp_path / r["video"])) for r in records]
    said = lmm_jax.load().ask_batch([Question(r["question"], *m) for r, m in zip(records, media)], max_new_tokens=16)
    assert len(records) > 80
    assert sum(text == r["answer"] for text, r in zip(said, records)) >= least * len(records)


def test_the_command_asks_it(capsys):
    for words, answer in (
        (["--image", PICTURE, "What colour is the circle?"], "red"),
        (["--image", PICTURE, "How many objects are in the picture?"], "3"),
        (["--video", CLIP, "Where does the circle go?"], "right"),
    ):
        assert main(["ask", *words]) == 0
        out, err = capsys.readouterr()
        assert out.strip() == answer and "demo model" in err

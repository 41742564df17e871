"""Counting tokens once: what is counted, what is kept, and when it is counted again."""

import dataclasses
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lmm_jax.data.tokenize import Tokenizer
from lmm_jax.errors import UserError
from train import lengths
from train.config import DataConfig, SourceConfig
from train.lengths import measure
from train.records import load_sources

TEXT = Path(__file__).parents[1] / "golden" / "text"
TURNS = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "Red."}]
RECORDS = [
    {"id": 1, "image": "a.png", "conversations": TURNS},
    {"id": 2, "conversations": []},
    {"id": 3, "video": "a.mp4", "conversations": TURNS},
    {"id": 4, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there, you."}]},
    {"id": 5, "image": "a.png", "conversations": TURNS[:1]},
]


@pytest.fixture(scope="module")
def vicuna():
    return Tokenizer.load(TEXT / "vicuna_tokenizer")


@pytest.fixture
def source(tmp_path):
    def load(records=RECORDS, **settings):
        (tmp_path / "a.json").write_text(json.dumps(records))
        (loaded,) = load_sources(DataConfig(sources=(SourceConfig(str(tmp_path / "a.json"), **settings),)))
        return loaded

    return load


@pytest.fixture
def counted(monkeypatch):
    """How many records were tokenised; the probe is none of them."""
    calls = []
    monkeypatch.setattr(lengths, "_row", lambda *given, row=lengths._row: calls.append(given) or row(*given))
    return lambda: len(calls)


def plain(found):
    return {f.name: np.asarray(getattr(found, f.name)).tolist() for f in dataclasses.fields(found)}


def test_counts(source, vicuna, tmp_path):
    found = plain(measure(source(), "v1", vicuna, tmp_path, progress=False))
    first = lengths.encode(source().record(0), "v1", vicuna)
    assert found["tokens"][0] == found["tokens"][2] == len(first[0])
    assert found["media"] == [1, 0, 1, 0, 0] and found["is_video"] == [0, 0, 1, 0, 0]
    assert found["labelled"][0] == (first[1] != -100).sum() and found["largest"][0] == first[0].max()
    assert found["fused"][0] == len(first[0]) - 1 - found["labelled"][0]
    assert found["tokens"][1] == found["tokens"][4] == 0
    reasons = [["1", "empty conversation"], ["4", "the last turn has no answer"]]
    assert [row[:2] for row in found["faults"]] == reasons


def test_counts_are_kept_and_read(source, vicuna, tmp_path, counted):
    first = plain(measure(source(), "v1", vicuna, tmp_path / "cache", progress=False))
    assert counted() == len(RECORDS)
    again = plain(measure(source(), "v1", vicuna, tmp_path / "cache", progress=False))
    assert counted() == len(RECORDS) and again == first
    assert [f.suffix for f in (tmp_path / "cache").iterdir()] == [".npz"]


def test_counts_are_made_again_when_anything_changes(source, vicuna, tmp_path, counted):
    cache, steps = tmp_path / "cache", []

    def count(loaded, template="v1", tokenizer=vicuna):
        before = counted()
        measure(loaded, template, tokenizer, cache, progress=False)
        steps.append(counted() - before)

    folder = tmp_path / "tokenizer"
    shutil.copytree(TEXT / "vicuna_tokenizer", folder)
    count(source())
    count(source(), "llava_v1")
    count(source(sampling="first:4"))
    count(source([*RECORDS[:4], RECORDS[0]]))
    count(source(), tokenizer=Tokenizer.load(folder))  # the same files in another place
    (folder / "tokenizer_config.json").write_text(
        json.dumps(json.loads((folder / "tokenizer_config.json").read_text()) | {"legacy": False})
    )
    count(source(), tokenizer=Tokenizer.load(folder))
    count(source(media="elsewhere"))
    assert steps == [5, 5, 4, 5, 0, 5, 0]


def test_counts_are_made_again_when_this_program_renders_otherwise(source, vicuna, tmp_path, counted, monkeypatch):
    measure(source(), "v1", vicuna, tmp_path, progress=False)
    monkeypatch.setattr("lmm_jax.data.conversation._VICUNA_SYSTEM", "A talk. ")
    measure(source(), "v1", vicuna, tmp_path, progress=False)
    assert counted() == 2 * len(RECORDS)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_broken_cache_is_made_again(damage, source, vicuna, tmp_path, counted):
    cache = tmp_path / "cache"
    first = plain(measure(source(), "v1", vicuna, cache, progress=False))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if damage == "other":
        np.savez(file, tokens=np.zeros(3))
    else:
        file.write_bytes(whole[: len(whole) // 2 if damage == "cut" else 0])
    assert plain(measure(source(), "v1", vicuna, cache, progress=False)) == first
    assert counted() == 2 * len(RECORDS) and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written(source, vicuna, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="set data.cache"):
        measure(source(), "v1", vicuna, tmp_path / "cache", progress=False)


def test_a_template_that_does_not_fit_the_tokenizer_is_an_error_and_not_a_reason_to_skip_all(source, vicuna, tmp_path):
    with pytest.raises(UserError, match="chat template"):
        measure(source(), "llava_llama_3_1", vicuna, tmp_path, progress=False)


def test_several_processes_count_the_same(source, vicuna, tmp_path, monkeypatch):
    loaded = source([RECORDS[i % len(RECORDS)] for i in range(23)])
    alone = plain(measure(loaded, "v1", vicuna, tmp_path / "a", progress=False))
    pools = []
    monkeypatch.setattr(lengths, "ProcessPoolExecutor", lambda *given: pools.append(given) or ProcessPoolExecutor(*given))
    monkeypatch.setattr(lengths, "_MANY", 20)
    monkeypatch.setattr(lengths, "_CHUNK", 2)
    monkeypatch.setattr(lengths.os, "cpu_count", lambda: 2)
    assert plain(measure(loaded, "v1", vicuna, tmp_path / "b", progress=False)) == alone
    assert pools
    files = [next((tmp_path / name).iterdir()) for name in "ab"]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()

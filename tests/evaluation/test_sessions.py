"""What `lmm eval answer` leaves and says beside the answers; no model is loaded for it."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import pytest
from evaluation.silent_engine import Engine
from support import GOLDEN

from lmm_jax.cli import main
from lmm_jax.config import named_sizes
from lmm_jax.demo.dataset import write_test_set
from lmm_jax.errors import UserError
from lmm_jax.evaluation import command
from lmm_jax.evaluation.runs import add_session
from lmm_jax.inference.assistant import Assistant


@pytest.fixture
def model(tmp_path):
    """A folder with all that tells a model from others."""
    folder = shutil.copytree(GOLDEN / "text" / "vicuna_tokenizer", tmp_path / "tiny")
    (folder / "params").mkdir()
    (folder / "params" / "manifest.ocdbt").write_text("x")
    return folder


@pytest.fixture
def answer(model, tmp_path, monkeypatch, capsys):
    """`lmm eval answer demo_small` with further words -> what it prints."""
    monkeypatch.setattr(command, "_load", lambda args: Assistant(model, named_sizes()["tiny"], Engine(args.mesh)))
    write_test_set(tmp_path / "world", images=3, clips=1, seed=1)

    def run(*words):
        place = ["--folder", f"demo_small={tmp_path / 'world'}", "--out", str(tmp_path / "run")]
        assert main(["eval", "answer", "demo_small", "--model", str(model), *place, *words]) == 0
        return capsys.readouterr().out

    return run


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_process_leaves_a_line(answer, tmp_path):
    run = tmp_path / "run"
    answer("--shard", "2/2", "--batch-size", "5", "--mesh", "data=2")
    assert "versions" not in json.loads((run / "settings.json").read_text())
    answer("--shard", "1/2")
    one, two = lines(run / "sessions.jsonl")
    assert abs(datetime.fromisoformat(one["time"]) - datetime.now(UTC)) < timedelta(hours=1)
    assert one["versions"] == {name: version(name) for name in ("lmm-jax", "jax", "flax")}
    assert (one["platform"], one["devices"], one["mesh"]) == ("cpu", 2, {"data": 2, "fsdp": 1, "tensor": 1})
    assert (one["batch_size"], one["shard"], one["benchmarks"]) == (5, "2/2", ["demo_small"])
    assert (two["batch_size"], two["shard"], two["devices"]) == (32, "1/2", 1)


def test_a_run_of_before_goes_on(answer, tmp_path):
    """Its settings name versions, and it has no sessions."""
    run = tmp_path / "run"
    answer("--shard", "1/2")
    (run / "sessions.jsonl").unlink()
    before = json.loads((run / "settings.json").read_text()) | {"versions": {"jax": "0.0"}}
    (run / "settings.json").write_text(json.dumps(before))
    answer("--shard", "2/2")
    assert json.loads((run / "settings.json").read_text()) == before and len(lines(run / "sessions.jsonl")) == 1
    assert (run / "demo_small" / "answers.jsonl").exists()


def test_lines_of_many_processes_stay_whole(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add_session(tmp_path, {"number": i, "text": "x" * 2000}), range(100)))
    assert sorted(line["number"] for line in lines(tmp_path / "sessions.jsonl")) == list(range(100))
    with pytest.raises(UserError, match="sessions.jsonl cannot be written"):
        add_session(tmp_path / "nowhere", {})


def test_counts_are_told(answer, tmp_path):
    run = tmp_path / "run"
    said = answer("--shard", "2/2")
    total = len(lines(tmp_path / "world" / "questions.jsonl"))
    left = total - len(lines(run / "demo_small" / "part.2of2.jsonl"))
    assert said.endswith(f": this shard is done, others are not, {total} records, {left} missing\n")
    picture = tmp_path / "world" / "images" / "000000.png"
    picture.write_bytes(picture.read_bytes()[:60])
    said = answer("--shard", "1/2")
    faults = [row for row in lines(run / "demo_small" / "answers.jsonl") if "fault" in row]
    assert said.endswith(f": {run}/demo_small/answers.jsonl, {total} records, {len(faults)} with a fault\n") and faults


def test_answers_have_names_that_are_always_the_same(answer, tmp_path):
    file = tmp_path / "run" / "demo_small" / "answers.jsonl"
    answer()
    names = [row["answer_id"] for row in lines(file)]
    assert len(set(names)) == len(names) and {len(name) for name in names} == {22}
    before = file.read_bytes()
    shutil.rmtree(tmp_path / "run")
    answer("--batch-size", "3")
    assert file.read_bytes() == before

"""Runs that go on: what may have changed meanwhile and what not, and what looks at a run from outside."""

import fcntl
import json
import shutil

import jax
import numpy as np
import pytest
from runs import (
    assert_same_model,
    compose_start,
    figures,
    leaves,
    lines,
    projector_only,
    turns,
    write_config,
    write_data,
    write_records,
)

from lmm_jax import checkpoint
from train.__main__ import main
from train.config import GroupConfig, SourceConfig
from train.loop import train
from train.setup import abstract_state, prepare


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with data, a start and a run that was stopped after two of four steps."""
    folder = tmp_path_factory.mktemp("begun")
    write_data(folder / "data", pictures=32, clips=0, texts=0)
    compose_start(folder / "start")
    assert train(config_in(folder, max_steps=2))
    return folder


@pytest.fixture
def copy(begun, tmp_path):
    """That folder in another place, so that all paths have changed."""
    return shutil.copytree(begun, tmp_path / "copy")


def config_in(folder, **changes):
    """Two epochs of two steps; all but the length of the run is given."""
    data = {"batch_size": 16, "epochs": 2} | changes.pop("data", {})
    return projector_only(folder / "run", folder / "data" / "records.json", folder / "start" / "model", data=data, **changes)


def refusal(config, capsys):
    before = lines(config.folder)
    assert main([str(write_config(config))]) == 2
    assert lines(config.folder) == before
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ")
    return error


def test_everything_moved_to_another_place_and_cut_in_parts(copy):
    (copy / "run" / "metrics.jsonl").unlink()
    assert train(config_in(copy, max_steps=2, optimizer={"accumulation": 2}))


def test_other_data(copy, capsys):
    file = copy / "data" / "records.json"
    records = json.loads(file.read_text())
    records[3]["conversations"][1]["value"] = "mauve"
    file.write_text(json.dumps(records))
    assert "was started with other training data: put them back" in refusal(config_in(copy, max_steps=2), capsys)


def test_another_start(copy, capsys):
    shutil.rmtree(copy / "start")
    compose_start(copy / "start")  # its projector is new, and trained: what is frozen is the same
    assert train(config_in(copy, max_steps=2))
    model = shutil.copytree(copy / "start" / "model", copy / "other")  # to differ in one frozen parameter
    config, arrays = checkpoint.read_config(model), leaves(model)
    arrays["norm.scale"] = arrays["norm.scale"] + np.float16(0.5)
    shutil.rmtree(copy / "start" / "model")
    stored = {n: checkpoint.LazyLeaf(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}
    checkpoint.write_model(copy / "start" / "model", config, stored, files=[p for p in model.iterdir() if "token" in p.name])
    assert "was started with other frozen parameters" in refusal(config_in(copy, max_steps=2), capsys)


def test_a_folder_is_trained_in_once_at_a_time(copy, capsys):
    with (copy / "run" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training in" in refusal(config_in(copy, max_steps=2), capsys)
    assert train(config_in(copy, max_steps=2))


def test_any_checkpoint_as_a_model_and_what_is_being_written_is_left_alone(begun, tmp_path, capsys):
    config = projector_only(
        tmp_path / "run", begun / "data" / "records.json", begun / "start" / "model", record={"checkpoint_steps": 1, "keep": 5}
    )
    assert train(config)
    last = shutil.copytree(tmp_path / "run" / "model", tmp_path / "last")
    writing = tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
    writing.mkdir()
    file = str(write_config(config))
    assert main(["export", "--step", "2", file]) == 0
    second = leaves(tmp_path / "run" / "model")
    changed = {name for name, leaf in leaves(last).items() if leaf.tobytes() != second[name].tobytes()}
    assert changed and all(name.startswith("mm_projector.") for name in changed)
    assert main(["export", file]) == 0
    assert_same_model(last, tmp_path / "run" / "model")
    assert writing.is_dir()
    capsys.readouterr()
    assert main(["export", "--step", "7", file]) == 2
    assert "has checkpoints [1, 2, 3, 4], not 7" in capsys.readouterr().err
    assert main(["export", "--step", "soon", file]) == 2
    assert "invalid int value" in capsys.readouterr().err


def test_an_evaluation_that_was_cut_off_is_made_up(copy):
    held = {"sources": (SourceConfig(str(copy / "data" / "records.json")),), "answers": 0}
    config = config_in(copy, max_steps=2, held_out=held)
    assert train(config) and train(config)
    assert [entry["step"] for entry in lines(config.folder) if "held_out_loss" in entry] == [2]


@pytest.mark.slow
def test_held_out_records_that_cannot_be_used_do_not_stop_a_run(begun, tmp_path):
    good = {"id": 0, "image": str(begun / "data" / "0.png"), "conversations": turns("<image>\nWhich colour?", "red")}
    gone = {"id": 1, "image": "gone.png", "conversations": turns("<image>\nWhich colour?", "red")}
    clip = {"video_id": "gone", "q": "What happens?", "a": "nothing"}
    for name, records, skipped in (("some", [good, gone, clip], 2), ("none", [gone, clip], 2)):
        file = write_records(tmp_path / f"{name}.json", records)
        held = {"sources": (SourceConfig(str(file)),), "answers": 3, "batches": 9}
        config = projector_only(
            tmp_path / name,
            begun / "data" / "records.json",
            begun / "start" / "model",
            max_steps=1,
            held_out=held,
            data={"max_length": 128},
        )
        assert train(config)
        assert figures(config.folder, "held_out_skipped") == {1: skipped}
        assert (figures(config.folder, "held_out_loss") == {}) == (name == "none")
        answers = figures(config.folder, "answers")[1].split("\n")
        assert [": not asked, " in answer for answer in answers] == [record is not good for record in records]
        report = (tmp_path / name / "skipped_held_out.0.jsonl").read_text()
        assert report.count("missing") == skipped


def test_records_skipped_beforehand_do_not_count_as_unreadable(begun, tmp_path):
    """1.5 % of them, where 2 % are allowed, and few have been read so far."""
    good = {"id": 0, "image": str(begun / "data" / "0.png"), "conversations": turns("<image>\nWhich colour?", "red")}
    file = write_records(tmp_path / "records.json", [good] * 1970 + [{"id": "empty", "conversations": []}] * 30)
    config = projector_only(tmp_path / "run", file, begun / "start" / "model", max_steps=1, data={"max_skipped": 0.02})
    assert train(config)
    assert figures(config.folder, "skipped") == {1: 30}
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 30


def test_nothing_to_train(begun, tmp_path, capsys):
    frozen = (GroupConfig(".*"),)
    config = projector_only(
        tmp_path / "run", begun / "data" / "records.json", begun / "start" / "model", optimizer={"groups": frozen}
    )
    assert "no group has a learning_rate" in refusal(config, capsys)


def test_trained_parameters_in_bfloat16_keep_moments_in_float32(begun, tmp_path):
    config = projector_only(
        tmp_path / "run", begun / "data" / "records.json", begun / "start" / "model",
        compute={"trained_dtype": "bfloat16"}, optimizer={"accumulation": 2},
    )  # fmt: skip
    state = abstract_state(prepare(config), 4)
    assert {leaf.dtype.name for leaf in state.trained.values()} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state.optimizer) if x.ndim} == {"float32"}
    assert train(config)
    losses = [*figures(config.folder).values()]
    assert losses[-1] < losses[0]

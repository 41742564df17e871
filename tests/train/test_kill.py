"""Runs that are stopped, asked or not, go on as if nothing had happened: the same batches, losses and weights to the bit."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import assert_same_model, figures, launch, lines, log, saved, small, until, wait, write_data

from train.loop import train
from train.record import Recorder

MESH, OTHERS = "data=2,fsdp=2,tensor=2", ("fsdp=4", "tensor=2")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Pictures, clips and text."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures only, in six batches."""
    return write_data(tmp_path_factory.mktemp("pictures"), pictures=48, clips=0, texts=0)


def stop_at(monkeypatch, step):
    """SIGTERM when the figures of a step are read."""
    advance = Recorder.advance

    def stop(self, now):
        advance(self, now)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "advance", stop)


def assert_tidy(folder):
    """Nothing half-written is left."""
    names = {str(p.relative_to(folder)) for p in Path(folder).rglob("*")}
    assert not [name for name in names if ".tmp" in name or "-tmp" in name or ".old" in name]


# -------------------------------------------------------------------------------------------------- asked to stop


@pytest.mark.slow
def test_stopped_and_resumed_on_any_mesh(pictures, tmp_path, monkeypatch):
    def config(name, mesh=MESH):
        return small(tmp_path / name, pictures, compute={"mesh": mesh}, record={"checkpoint_steps": 0})

    assert train(config("whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert not train(config("stopped"))
    assert saved(tmp_path / "stopped") == [4]  # step 2 was on its way, 3 told all devices, 4 was on its way when they knew
    assert not (tmp_path / "stopped" / "model").exists()
    for mesh in OTHERS:
        shutil.copytree(tmp_path / "stopped", tmp_path / mesh)

    whole = figures(tmp_path / "whole")
    assert train(config("stopped"))
    assert sorted(whole) == [1, 2, 3, 4, 5, 6] and figures(tmp_path / "stopped") == whole
    assert_same_model(tmp_path / "whole" / "model", tmp_path / "stopped" / "model")
    for mesh in OTHERS:
        assert train(config(mesh, mesh))
        assert figures(tmp_path / mesh) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_sigterm_stops_the_command(pictures, tmp_path):
    """At whatever moment of a step it comes."""
    config = small(tmp_path / "run", pictures, data={"epochs": 8}, record={"checkpoint_steps": 0})
    process = launch(config)
    until(lambda: len(figures(config.folder)) > 2, process)
    process.terminate()
    assert wait(process) == 143
    done = saved(config.folder)
    assert len(done) == 1 and 3 <= done[0] < 48
    assert f"asked to stop: saved step {done[0]} of 48" in log(config)
    assert_tidy(config.folder)


# ---------------------------------------------------------------------------------------------------- killed


def kill(process):
    process.kill()
    process.wait()


def resumed_from(config):
    """The step that a start says it goes on from, None where it did not come that far."""
    text = log(config)
    return int(text.split("going on from step ")[1].split()[0]) if "going on from step " in text else None


def assert_equal_runs(whole, killed):
    assert figures(killed.folder) == figures(whole.folder)
    assert_same_model(Path(whole.folder, "model"), Path(killed.folder, "model"))
    assert saved(killed.folder) == saved(whole.folder)
    assert_tidy(killed.folder)


@pytest.mark.slow
def test_two_kills(records, tmp_path):
    """One while it trains, one while it writes the model folder."""
    whole, killed = (small(tmp_path / name, records, data={"epochs": 2}) for name in ("whole", "killed"))
    assert wait(launch(whole)) == 0, log(whole)

    process = launch(killed)
    until(lambda: saved(killed.folder), process)
    kill(process)
    process = launch(killed)
    until(lambda: list(Path(killed.folder).glob(".model.tmp-*")), process)
    kill(process)
    assert not Path(killed.folder, "model").exists()
    assert wait(launch(killed)) == 0, log(killed)
    assert resumed_from(killed) == 10
    assert_equal_runs(whole, killed)


@pytest.mark.long
def test_twenty_kills_at_random_times(records, tmp_path):
    """What is compiled is kept in a folder of its own, so that its files are killed half-written too."""
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    every = {"data": {"epochs": 40}, "record": {"checkpoint_steps": 4}}
    whole, killed = (small(tmp_path / name, records, **every) for name in ("whole", "killed"))
    assert wait(launch(whole, **environment)) == 0, log(whole)
    seconds = [*figures(whole.folder, "seconds_per_step").values()][20:]  # all is compiled by then
    interval = 4 * sum(seconds) / len(seconds)  # from one checkpoint to the next
    chance, expected = random.Random(0), None
    for _ in range(20):
        process, before = launch(killed, **environment), len(lines(killed.folder))
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, 6))  # while it starts
        else:
            enough = before + chance.randint(1, 12)
            until(lambda enough=enough: len(lines(killed.folder)) >= enough, process)
            time.sleep(chance.uniform(0, interval))  # while it trains
        assert process.poll() is None
        kill(process)
        assert resumed_from(killed) in (expected, None), log(killed)
        expected = max(saved(killed.folder), default=None)
    assert wait(launch(killed, **environment)) == 0, log(killed)
    assert resumed_from(killed) == expected > 5
    assert_equal_runs(whole, killed)

"""A run whose data, start, checkpoints and model lie in a bucket is that on the disk. The bucket is served by an emulator."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from runs import (
    ROOT,
    STAGE_2,
    figures,
    launch,
    leaves,
    log,
    saved,
    small,
    until,
    wait,
    write_data,
    write_start,
)

from lmm_jax import checkpoint, storage
from lmm_jax.errors import UserError
from train.config import SourceConfig
from train.export import check_folder
from train.loop import train

BUCKET = "gs://bucket"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The environment in which gs://bucket is a server here."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    with (tmp_path_factory.mktemp("server") / "log").open("w") as out:
        server = subprocess.Popen([sys.executable, ROOT / "tests" / "gcs_server.py", str(port)], stdout=out, stderr=out)
    environment = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_CLOUD_PROJECT": "project"}
    environment |= {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "any", "FSSPEC_GS_TOKEN": "anon", "FSSPEC_GCS_TOKEN": "anon"}
    environment["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b/bucket/o", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail("the server does not answer")
        yield
    server.kill()


def upload(folder: Path, to: str) -> str:
    for file in filter(Path.is_file, folder.rglob("*")):
        storage.as_path(f"{to}/{file.relative_to(folder)}").write_bytes(file.read_bytes())
    return to


@pytest.fixture(scope="module")
def places(bucket, tmp_path_factory):
    """Records and a model folder on the disk, and the same in the bucket."""
    here = tmp_path_factory.mktemp("here")
    records = write_data(here / "data", pictures=12, clips=3, texts=6)
    (records.parent / "5.png").unlink()
    start = write_start(here / "start")
    there = upload(records.parent, f"{BUCKET}/data"), upload(start, f"{BUCKET}/start")
    return (str(records), str(start)), (f"{there[0]}/{records.name}", there[1])


def run_of(folder, records, start, **record):
    begin = {"scratch": None, "tokenizer": "", "folder": start, "compressor_size": 1, "prefusion_layers": 2}
    data = {"sources": (SourceConfig(records),), "max_skipped": 0.2}
    record = {"checkpoint_steps": 1, "log_steps": 1} | record
    return small(folder, Path("unused"), start=begin, data=data, optimizer={"groups": STAGE_2}, record=record)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_the_disk(places, tmp_path):
    """Killed after its first checkpoint, and gone on with from another folder, as on another machine."""
    here, there = places
    one = run_of(tmp_path / "one", *here)
    assert wait(launch(one)) == 0, log(one)

    two = run_of(tmp_path / "two", *there, bucket=f"{BUCKET}/run")
    process = launch(two)
    until(lambda: list(storage.as_path(f"{BUCKET}/run/checkpoints").glob("*/commit_success*")), process)
    process.kill()
    process.wait()
    assert not saved(two.folder) and not storage.exists(f"{BUCKET}/run/model/config.json")

    other = run_of(tmp_path / "other", *there, bucket=f"{BUCKET}/run")
    assert wait(launch(other)) == 0, log(other)
    assert "going on from step" in log(other)
    losses = figures(one.folder)
    assert figures(other.folder) == {step: loss for step, loss in losses.items() if step in figures(other.folder)}
    assert len(losses) in figures(other.folder)
    assert figures(other.folder, "skipped")[len(losses)] == 1
    assert '"picture missing", "detail": "gs://bucket/data/5.png"' in Path(other.folder, "skipped.0.jsonl").read_text()

    model = f"{BUCKET}/run/model"
    assert checkpoint.read_config(model) == checkpoint.read_config(Path(one.folder) / "model")
    assert storage.exists(f"{model}/tokenizer_config.json")
    got, expected = leaves(model), leaves(Path(one.folder) / "model")
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name].tobytes() != expected[name].tobytes()] == []


@pytest.mark.slow
def test_asking_a_model_in_a_bucket(places):
    (_, _), (_, start) = places
    command = [sys.executable, "-m", "lmm_jax", "ask", "--model", start, "--max-new-tokens", "2", "Hello?"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_model_is_written_whole(places, tmp_path):
    (_, start), _ = places
    config, name = checkpoint.read_config(start), f"{BUCKET}/written"
    leaves = {n: checkpoint.read_leaf(start, n) for n in checkpoint.leaf_shapes(start)}

    class Broken(Exception):
        pass

    def fail(_):
        raise Broken

    with pytest.raises(Broken):
        checkpoint.write_model(name, config, leaves, progress=fail)
    with pytest.raises(UserError, match="there is no folder"):
        checkpoint.read_config(name)
    storage.as_path(f"{name}/.growing").write_text("")  # as of one that was killed while it copied
    storage.as_path(f"{name}/params/some").write_text("")
    check_folder(storage.as_path(name))
    with pytest.raises(UserError, match="no model folder"):
        checkpoint.read_config(name)
    checkpoint.write_model(name, config, leaves)  # what failed is replaced
    assert not storage.exists(f"{name}/params/some") and not storage.exists(f"{name}/.growing")
    assert checkpoint.read_config(name) == config
    assert checkpoint.leaf_shapes(name) == checkpoint.leaf_shapes(start)
    with pytest.raises(UserError, match="exists already"):
        checkpoint.write_model(name, config, leaves)
    checkpoint.write_model(name, config, leaves, overwrite=True)


def test_what_is_not_there(places, tmp_path):
    with pytest.raises(UserError, match=f"there is no folder {BUCKET}/nothing"):
        checkpoint.read_config(f"{BUCKET}/nothing")
    with pytest.raises(UserError, match="cannot be read"):
        train(run_of(tmp_path / "run", f"{BUCKET}/nothing.json", f"{BUCKET}/start"))


def test_what_a_bucket_takes(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"in a bucket, which takes pip install 'lmm-jax\[gcs\]'"):
        checkpoint.read_config(f"{BUCKET}/start")


def test_a_run_has_a_folder_on_the_disk():
    with pytest.raises(UserError, match="folder and data.cache are on this machine"):
        run_of(f"{BUCKET}/run", "records.json", "start")

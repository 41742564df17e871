"""`lmm eval answer`: the same answers file whatever the batches, devices, shards and kills; media that are not there."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from support import slow

from lmm_jax.cli import main
from lmm_jax.demo import MODEL
from lmm_jax.demo.dataset import write_test_set

PICTURES, CLIPS, SEED = 4, 2, 9


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A small demo world in place of the benchmark's own."""
    folder = tmp_path_factory.mktemp("world")
    write_test_set(folder, images=PICTURES, clips=CLIPS, seed=SEED)
    return folder


@pytest.fixture(scope="module")
def words(questions):
    """Of the command, but for the run folder."""
    model = ["--model", str(MODEL), "--name", "tiny", "--dtype", "float32"]
    return ["eval", "answer", "demo_small", "--folder", f"demo_small={questions}", *model]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The answers of a run that nobody stops, in batches of 7."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*words, "--batch-size", "7", "--out", str(run)]) == 0
    return run


def answers(run):
    return (run / "demo_small" / "answers.jsonl").read_bytes()


def part(run, name="part.1of1.jsonl"):
    file = run / "demo_small" / name
    return file.read_bytes() if file.exists() else b""


def refusal(capsys, *words):
    status = main([*map(str, words)])
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == "" and len(said) == 1 and "Traceback" not in err, err
    return said[0]


def launch(words, *more, devices=1, log=None, **environment):
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]), **environment}
    command = [sys.executable, "-m", "lmm_jax", *words, *map(str, more)]
    with open(log or os.devnull, "w") as out:
        return subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=subprocess.STDOUT)


# ---- one answers file


def test_every_record_has_its_answer(whole, questions, words, capsys):
    asked = [json.loads(line) for line in (questions / "questions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in answers(whole).splitlines()]
    assert [row["question"] for row in rows] == [row["question"] for row in asked] and len(rows) >= 30
    assert all(row["model_id"] == "tiny" and "fault" not in row for row in rows) and any(row["text"] for row in rows)
    assert sorted(json.loads(line)["key"] for line in part(whole).splitlines()) == list(range(len(rows)))
    settings = json.loads((whole / "settings.json").read_text())
    assert settings["model"] == "tiny" and settings["dtype"] == "float32"
    # answering again asks nothing
    before = part(whole)
    assert main([*words, "--out", str(whole)]) == 0 and part(whole) == before
    assert "demo world" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    slow(["--batch-size", "13", "--mesh", "data=8"], ["--batch-size", "1"], ["--batch-size", "32"]),
)
def test_batches_and_devices_change_nothing(words, whole, tmp_path, more):
    assert main([*words, *more, "--out", str(tmp_path / "run")]) == 0
    assert answers(tmp_path / "run") == answers(whole)


@pytest.mark.slow
def test_shards(words, whole, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*words, "--shard", "2/2", "--out", str(run)]) == 0
    assert "this shard is done, others are not" in capsys.readouterr().out and not (run / "demo_small/answers.jsonl").exists()
    assert main([*words, "--shard", "1/2", "--out", str(run)]) == 0
    assert answers(run) == answers(whole)
    rows = [json.loads(line) for line in answers(run).splitlines()]
    keys = [[json.loads(line)["key"] for line in part(run, f"part.{i}of2.jsonl").splitlines()] for i in (1, 2)]
    media = [{rows[key]["id"].rsplit("-", 1)[0] for key in of} for of in keys]  # questions about one stay together
    assert len(media[0]) == len(media[1]) == (PICTURES + CLIPS) / 2 and not media[0] & media[1]


@pytest.mark.slow
def test_two_processes_share_the_work(words, whole, tmp_path):
    """Each on its own devices, without being told its shard."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"LMM_COORDINATOR": f"localhost:{free.getsockname()[1]}", "LMM_PROCESSES": "2"}
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    mesh = ["--mesh", "data=2", "--out", run]
    both = [launch(words, *mesh, devices=2, log=logs[i], **shared, LMM_PROCESS=str(i)) for i in range(2)]
    assert [process.wait(300) for process in both] == [0, 0], "\n".join(log.read_text() for log in logs)
    assert answers(run) == answers(whole) and part(run, "part.1of2.jsonl") and part(run, "part.2of2.jsonl")


# ---- stopped


def test_a_line_half_written_is_asked_again(words, whole, tmp_path):
    run = tmp_path / "run"
    folder = run / "demo_small"
    folder.mkdir(parents=True)
    for name in ("settings.json", "demo_small/settings.json"):
        (run / name).write_bytes((whole / name).read_bytes())
    lines = part(whole).splitlines(keepends=True)
    (folder / "part.1of1.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:-4])
    assert main([*words, "--out", str(run)]) == 0
    assert answers(run) == answers(whole) and part(run).splitlines(keepends=True)[:9] == lines[:9]
    assert len(part(run).splitlines()) == len(lines)


def test_ctrl_c(words, whole, tmp_path, monkeypatch):
    """Answers that have come are kept."""
    from lmm_jax.evaluation.runs import PartWriter

    add, came = PartWriter.add, []

    def eleventh(self, answered):
        came.append(answered)
        if len(came) == 11:
            raise KeyboardInterrupt
        add(self, answered)

    monkeypatch.setattr(PartWriter, "add", eleventh)
    assert main([*words, "--batch-size", "5", "--out", str(tmp_path / "run")]) == 130
    assert len(part(tmp_path / "run").splitlines()) == 10
    monkeypatch.undo()
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert answers(tmp_path / "run") == answers(whole)


def kill_at_random(words, run, kills, chance):
    """Kills that many processes at random moments, some before their first answer; then lets one come to its end."""
    begun = time.monotonic()
    for _ in range(kills):
        process, before = launch(words, "--batch-size", 1, "--out", run), len(part(run))
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, 5))  # while it starts
        else:
            while len(part(run)) == before and process.poll() is None and time.monotonic() < begun + 600:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))  # while it answers
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "demo_small" / "answers.jsonl").exists()
    assert launch(words, "--out", run).wait(300) == 0


@pytest.mark.slow
def test_a_kill(words, whole, tmp_path):
    kill_at_random(words, tmp_path / "run", 1, random.Random(1))
    assert answers(tmp_path / "run") == answers(whole)
    assert len(part(tmp_path / "run").splitlines()) == len(part(whole).splitlines())


@pytest.mark.long
def test_twenty_kills_at_random_moments(words, tmp_path_factory):
    """Of a run of 800 questions, so that none comes to its end before."""
    folder = tmp_path_factory.mktemp("twenty")
    write_test_set(folder / "world", images=110, clips=10, seed=SEED)
    words = [f"demo_small={folder / 'world'}" if word.startswith("demo_small=") else word for word in words]
    kill_at_random(words, folder / "killed", 20, random.Random(0))
    assert main([*words, "--out", str(folder / "whole")]) == 0
    assert answers(folder / "killed") == answers(folder / "whole")
    keys = [json.loads(line)["key"] for line in part(folder / "killed").splitlines()]
    assert sorted(keys) == list(range(len(answers(folder / "whole").splitlines())))


# ---- refusals


@pytest.fixture
def spoilt(questions, tmp_path):
    """The world with one picture missing and one broken."""
    folder = tmp_path / "world"
    for file in questions.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(questions)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(questions)).write_bytes(file.read_bytes())
    (folder / "images" / "000001.png").unlink()
    broken = folder / "images" / "000002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return folder


def test_media_that_cannot_be_read(words, whole, spoilt, tmp_path, capsys):
    run = tmp_path / "run"
    words = [f"demo_small={spoilt}" if word.startswith("demo_small=") else word for word in words]
    said = refusal(capsys, *words, "--out", run)
    assert "1 pictures or videos are not there" in said and "000001.png" in said and not run.exists()

    assert main([*words, "--allow-missing", "--out", str(run)]) == 0
    capsys.readouterr()
    rows, expected = ([json.loads(line) for line in answers(r).splitlines()] for r in (run, whole))
    spoilt_rows = [row for row in rows if "fault" in row]
    assert {row["id"].rsplit("-", 1)[0] for row in spoilt_rows} == {"image-000001", "image-000002"}
    assert all(row["text"] == "" and ".png" in row["fault"] for row in spoilt_rows)
    assert [row for row in rows if "fault" not in row] == [e for e, r in zip(expected, rows) if "fault" not in r]

    assert main(["eval", "score", "demo_small", "--folder", f"demo_small={spoilt}", "--out", str(run)]) == 0
    assert f"{len(spoilt_rows)} faults, counted as wrong" in capsys.readouterr().out
    counts = json.loads((run / "demo_small" / "scores.json").read_text())["counts"]
    assert counts == {"records": len(rows), "missing": 0, "faults": len(spoilt_rows)}


def test_another_model_or_another_limit_is_not_mixed_in(words, whole, capsys):
    assert "model was 'tiny' and is 'other'" in refusal(capsys, *words, "--name", "other", "--out", whole)
    assert "max_new_tokens was 16 and is 4" in refusal(capsys, *words, "--max-new-tokens", 4, "--out", whole)
    assert "template was" in refusal(capsys, *words, "--template", "plain", "--out", whole)


def test_two_at_once(words, whole, tmp_path, capsys):
    import fcntl

    run = tmp_path / "run"
    (run / "demo_small").mkdir(parents=True)
    for name in ("settings.json", "demo_small/settings.json"):
        (run / name).write_bytes((whole / name).read_bytes())
    with open(run / "demo_small" / "part.1of1.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is adding to" in refusal(capsys, *words, "--out", run)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--batch-size", "0"], "--batch-size 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--mesh", "data=16"], "data=16"),
        (["--mesh", "nonsense"], "nonsense"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_settings_that_cannot_work(words, tmp_path, capsys, more, said):
    assert said in refusal(capsys, *words, *more, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "demo_small").exists()


# ---- the run folder


def test_many_processes_may_begin_a_run(tmp_path):
    """As shards do, all at once."""
    from concurrent.futures import ThreadPoolExecutor

    from lmm_jax.evaluation.runs import settings_of, settle

    for i in range(20):
        run = tmp_path / str(i)
        with ThreadPoolExecutor(8) as pool:
            assert [*pool.map(lambda _, run=run: settle(run, {"model": "m"}, fresh=True), range(8))] == 8 * [None]
        assert settings_of(run) == {"model": "m"} and [f.name for f in run.iterdir()] == ["settings.json"]
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".settings.json.host.1.part").write_text("{")  # by one that was killed just then
    settle(killed, {"model": "m"}, fresh=True)


def test_answers_to_other_questions_are_not_scored(words, whole, questions, tmp_path, capsys):
    turned = tmp_path / "world"
    turned.mkdir()
    for name in ("images", "clips"):
        (turned / name).symlink_to(questions / name)
    rows = (questions / "questions.jsonl").read_text().splitlines(keepends=True)
    (turned / "questions.jsonl").write_text("".join(rows[::-1]))
    place = ["--folder", f"demo_small={turned}", "--out", whole]
    assert "were given to other questions" in refusal(capsys, "eval", "score", "demo_small", *place)
    words = [f"demo_small={turned}" if word.startswith("demo_small=") else word for word in words]
    assert "questions was" in refusal(capsys, *words, "--out", whole)
    (turned / "questions.jsonl").write_text("")
    assert "has no question below" in refusal(capsys, "eval", "score", "demo_small", *place)


def test_scoring_too_early_does_no_harm(words, whole, questions, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    place = ["--folder", f"demo_small={questions}", "--out", str(run)]
    assert main(["eval", "score", "demo_small", "--allow-missing", *place]) == 0
    assert main([*words, "--out", str(run)]) == 0 and answers(run) == answers(whole)


def test_a_medium_that_is_mended_is_asked_about_again(words, whole, spoilt, questions, tmp_path):
    words = [f"demo_small={spoilt}" if word.startswith("demo_small=") else word for word in words]
    run = tmp_path / "run"
    assert main([*words, "--allow-missing", "--out", str(run)]) == 0
    for name in ("000001.png", "000002.png"):
        (spoilt / "images" / name).write_bytes((questions / "images" / name).read_bytes())
    assert main([*words, "--out", str(run)]) == 0
    assert answers(run) == answers(whole)

"""Whole runs: what they leave behind, both stages, what they refuse, what stops them."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    PROJECTOR,
    STAGE_1,
    STAGE_2,
    assert_same_model,
    compose_start,
    figures,
    leaves,
    lines,
    projector_only,
    small,
    turns,
    write_config,
    write_data,
    write_records,
)
from support import GOLDEN, slow

import lmm_jax
from conversion.from_hf import Options, from_hf
from conversion.to_hf import to_hf
from lmm_jax.checkpoint import unstack
from train.__main__ import main
from train.config import GroupConfig, SourceConfig
from train.loop import train
from train.setup import abstract_state, initial_state, prepare
from train.step import join


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Pictures, clips and text."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures only: four batches of one shape."""
    return write_data(tmp_path_factory.mktemp("pictures"), pictures=32, clips=0, texts=0)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model folder composed of an LLM in float16 and a CLIP in float32."""
    return compose_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def projected(pictures, start, tmp_path_factory):
    """The folder of a stage 1 of two steps."""
    folder = tmp_path_factory.mktemp("stage_1") / "run"
    assert train(projector_only(folder, pictures, start, max_steps=2))
    return folder


def command(config, *words):
    """Through the command line."""
    return main([str(write_config(config)), *words])


# -------------------------------------------------------------------------------------------------------------- wholes


@pytest.mark.slow
def test_a_run_from_nothing(records, tmp_path):
    held = {"sources": (SourceConfig(str(records)),), "every": 4, "batches": 1}
    config = small(tmp_path / "run", records, held_out=held)
    assert command(config) == 0
    steps = 5  # three batches of pictures, one of clips, one of text
    wanted = ["loss", "grad_norm", "tokens_per_s", "samples_per_s", "padding", "skipped", "epoch"]
    for name in (*wanted, *(f"learning_rate/{g.pattern}" for g in STAGE_2[:2])):
        found = figures(config.folder, name)
        assert sorted(found) == [*range(1, steps + 1)] and np.isfinite([*found.values()]).all(), name
    assert figures(config.folder, f"learning_rate/{PROJECTOR}")[1] == pytest.approx(1e-3)
    assert sorted(figures(config.folder, "held_out_loss")) == sorted(figures(config.folder, "answers")) == [4, 5]
    assert "expected 'red'" in figures(config.folder, "answers")[5]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "5"]

    model = tmp_path / "run" / "model"
    assert isinstance(lmm_jax.load(model).ask("Which colour?", [records.parent / "0.png"], max_new_tokens=4), str)
    to_hf(str(model), str(tmp_path / "hf"), report=lambda _: None)
    from_hf(str(tmp_path / "hf"), str(tmp_path / "back"), Options(report=lambda _: None))
    assert_same_model(model, tmp_path / "back")

    shutil.move(model, tmp_path / "first")
    before = lines(config.folder)
    assert command(config) == 0  # nothing left to do but to write the model
    assert_same_model(tmp_path / "first", model)
    assert lines(config.folder) == before


def test_stage_1_changes_the_projector_alone(start, projected):
    before, after = leaves(start), leaves(projected / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if name.startswith("mm_projector.")}
    assert {a.dtype for name, a in after.items() if name.startswith("layers.")} == {np.dtype(np.float16)}


@pytest.mark.parametrize("init", slow("llm_first_layers", "random", "identity"))
def test_stage_2_adds_and_trains(pictures, projected, tmp_path, init):
    begin = {"scratch": None, "tokenizer": "", "folder": str(projected / "model"), "prefusion_init": init}
    config = small(tmp_path / "run", pictures, max_steps=2, start=begin | {"compressor_size": 1, "prefusion_layers": 2})
    setup = prepare(config)
    state = initial_state(setup, abstract_state(setup, 2))
    params = jax.device_get(join(state.trained, state.frozen))
    check_initialisation(init, setup.model, params)

    assert train(config)
    before, after = leaves(projected / "model"), leaves(tmp_path / "run" / "model")
    assert before.keys() <= after.keys()
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"compressor", "prefusion_layers"}
    # word embeddings meet no gradient where there are pictures (spec section 4)
    same = {name for name, leaf in before.items() if np.array_equal(leaf, after[name])}
    assert same == {name for name in before if name.startswith(("vision_tower.", "embed_tokens."))}
    for name, leaf in unstack(params).items():
        # a constant; and a bias that adds the same to all scores of a query, so that nothing depends on it
        kept = name in same or name in ("compressor.pos_embed", "compressor.attn.k_proj.bias")
        assert np.array_equal(leaf.read(), after[name]) == kept, name


def check_initialisation(init, model, params):
    named = {name: leaf.read() for name, leaf in unstack(params).items()}
    added = {name.removeprefix("prefusion_"): leaf for name, leaf in named.items() if name.startswith("prefusion_layers.")}
    assert {name.split(".")[1] for name in added} == {"0", "1"}
    copied = [np.array_equal(leaf, named[name]) for name, leaf in added.items() if "layernorm" not in name]
    assert all(copied) if init == "llm_first_layers" else not any(copied)
    call = functools.partial(model.apply, {"params": params})
    size = model.config.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (1, 1, size, size, 3), np.uint8)
    text = call(jnp.arange(5, 9)[None], method="embed")
    fused = call(text, call(pixels, method="encode_image"), method="fuse_text")
    assert np.array_equal(fused, text) == (init == "identity")


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(capsys):
    """The one sentence on standard error, after what shows progress."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "there is no configuration"),
        ("x = 1", r"has no function get_config\(\) that returns a TrainConfig"),
        ("def get_config():\n    return 3", r"has no function get_config\(\)"),
        ("def get_config(:", "cannot be read: SyntaxError"),
        ("def get_config():\n    return {}['x']", "cannot be read: KeyError: 'x'"),
        (
            "from train.config import *\ndef get_config():\n    return TrainConfig('x')",
            "start.folder, a model folder, or from",
        ),
    ],
)
def test_files_that_are_no_configuration(tmp_path, capsys, content, message):
    file = tmp_path / "config.py"
    if content:
        file.write_text(content)
    assert main([str(file)]) == 2
    assert re.match(f"error: .*{message}", refusal(capsys))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"compute": {"mesh": "fsdp=8"}, "data": {"batch_size": 12}}, "batch_size 12 is not a multiple of 8"),
        ({"compute": {"mesh": "fsdp=16"}}, "needs 16 devices, but there are 8"),
        ({"compute": {"attention": "magic"}}, "there is no attention 'magic'"),
        ({"optimizer": {"groups": (*STAGE_1, GroupConfig("lm_hat/.*", 1e-3))}}, "the group 'lm_hat/.*' matches no parameter"),
        ({"optimizer": {"groups": STAGE_1[:1]}}, "embed_tokens/embedding is in 0 groups"),
        ({"start": {"folder": "nowhere"}}, "there is no folder nowhere"),
        ({"start": {"folder": str(GOLDEN / "llava_v1_5" / "hf")}}, "Hugging Face checkpoint that is not converted yet"),
        ({"data": {"sources": (SourceConfig("nowhere.json"),)}}, "nowhere.json cannot be read"),
        ({"held_out": {"sources": (SourceConfig("nothing.json"),)}}, "nothing.json cannot be read"),
    ],
)
def test_settings_that_cannot_work(pictures, start, tmp_path, capsys, changes, message):
    assert command(projector_only(tmp_path / "run", pictures, start, **changes)) == 2
    assert message in refusal(capsys)
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize("words", [["--data.batch-size", "0"], ["--data.batches", "8"], ["--optimizer.clip", "much"]])
def test_words_that_cannot_work(pictures, start, tmp_path, capsys, words):
    """Not one sentence, but those of the command line's own parser."""
    with pytest.raises(SystemExit) as stopped:
        command(projector_only(tmp_path / "run", pictures, start), *words)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_another_run_in_the_folder(pictures, start, projected, capsys):
    before = lines(projected)
    config = projector_only(projected, pictures, start, max_steps=2, data={"seed": 7})
    assert command(config) == 2
    assert "was started with other settings (data.seed was 0 and is 7)" in refusal(capsys)
    assert lines(projected) == before


@pytest.mark.parametrize("what", ["a file", "another folder", "the run's folder is a file"])
def test_a_folder_that_is_taken(pictures, start, tmp_path, capsys, what):
    run = tmp_path / "run"
    if what == "a file":
        run.mkdir()
        (run / "model").write_text("mine")
    elif what == "another folder":
        (run / "model").mkdir(parents=True)
        (run / "model" / "thesis.txt").write_text("mine")
    else:
        run.write_text("mine")
    assert command(projector_only(run, pictures, start)) == 2
    expected = "cannot be made" if run.is_file() else f"is to write its model to {run / 'model'}, which is taken"
    assert expected in refusal(capsys)
    assert [p.read_text() for p in (run, *run.rglob("*")) if p.is_file()] == ["mine"]


@pytest.mark.parametrize("when", ["beforehand", "while training"])
def test_too_many_unusable_records(start, tmp_path, capsys, when):
    usable = [{"id": i, "image": "0.png", "conversations": turns("<image>\nWhich colour?", "red")} for i in range(14)]
    write_data(tmp_path, pictures=1, clips=0, texts=0)
    if when == "beforehand":
        faulty, message = {"id": "faulty", "conversations": []}, "2 of 16 records are unusable (empty conversation: 2)"
    else:
        faulty, message = usable[0] | {"id": "faulty", "image": "gone.png"}, "records so far could not be read"
    file = write_records(tmp_path / "faulty.json", usable + [faulty] * 2)
    config = projector_only(tmp_path / "run", file, start, data={"max_skipped": 0.1})
    assert command(config) == 2
    assert message in refusal(capsys)
    report = "skipped.jsonl" if when == "beforehand" else "skipped.0.jsonl"
    assert (tmp_path / "run" / report).read_text().count("faulty.json") == 2


def test_processes_that_do_not_know_who_they_are(pictures, start, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LMM_COORDINATOR", "localhost:1")
    assert command(projector_only(tmp_path / "run", pictures, start)) == 2
    assert "also needs LMM_PROCESSES and LMM_PROCESS" in refusal(capsys)


# --------------------------------------------------------------------------------------------- what happens on the way


def test_divergence_stops_a_run(pictures, start, tmp_path, capsys):
    groups = (GroupConfig(PROJECTOR, 1e30), STAGE_1[1])
    config = projector_only(tmp_path / "run", pictures, start, optimizer={"groups": groups}, record={"checkpoint_steps": 1})
    assert command(config) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(r"error: loss (nan|inf) .* at step 2, batch 1 \(.*records.json record \d+, .*", err)
    assert "the last checkpoint is step 1" in err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert not (tmp_path / "run" / "model").exists()


def test_few_unusable_records_are_left_out(start, tmp_path):
    """A missing picture is trained around, named and counted."""
    file = write_data(tmp_path, pictures=16, clips=0, texts=0)
    (tmp_path / "3.png").unlink()
    assert train(projector_only(tmp_path / "run", file, start, data={"max_skipped": 0.1, "epochs": 2}))
    assert [*figures(tmp_path / "run", "skipped").values()][-1] == 2
    report = (tmp_path / "run" / "skipped.0.jsonl").read_text().splitlines()
    assert len(report) == 1 and "picture missing" in report[0] and "3.png" in report[0]


@pytest.mark.parametrize("wanted", [(1, 2), (3, 9)])
def test_traces(pictures, start, tmp_path, wanted):
    """Also where the run ends inside the traced range."""
    assert train(projector_only(tmp_path / "run", pictures, start, record={"profile": wanted}))
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


def test_a_checkpoint_as_a_model(pictures, start, projected, capsys):
    """`export` writes the folder again, equal to the bit."""
    shutil.move(projected / "model", projected / "first")
    assert main(["export", str(write_config(projector_only(projected, pictures, start, max_steps=2)))]) == 0
    assert capsys.readouterr().out.strip() == str(projected / "model")
    assert_same_model(projected / "first", projected / "model")


def test_no_checkpoint_to_export(pictures, start, tmp_path, capsys):
    assert main(["export", str(write_config(projector_only(tmp_path / "run", pictures, start)))]) == 2
    assert "has no checkpoint yet" in refusal(capsys)

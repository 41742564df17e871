"""Records -> batches: the golden tokens, the right pictures, the same for any number of hosts, threads and starts."""

import dataclasses
import functools
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data.test_video import make_clip, number_of
from PIL import Image

from lmm_jax.config import IGNORE_LABEL, IMAGE_TOKEN_ID, CompressorConfig, named_sizes
from lmm_jax.data.image import load_image, preprocess
from lmm_jax.data.layout import Row, lay_out
from lmm_jax.data.tokenize import Tokenizer
from lmm_jax.data.video import frame_indices
from lmm_jax.errors import UserError
from train import data as train_data
from train.config import DataConfig, SourceConfig
from train.data import Skipped, SkipReport, TrainData, write_skipped
from train.lengths import encode

TEXT = Path(__file__).parents[1] / "golden" / "text"
GOLDEN = json.loads((TEXT / "conversations.json").read_text("utf-8"))["training"]
TINY = named_sizes()["tiny"]


@functools.cache
def tokenizer(name="vicuna"):
    return Tokenizer.load(TEXT / f"{name}_tokenizer")


def turns(answer, question="<image>\nWhat is it?"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture: 20 pictures of many shapes, 2 clips, 7 text-only records and one with two pictures."""
    folder = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(0)
    records = []
    for i in range(20):
        pixels = rng.integers(0, 255, (60 + 3 * i, 90 - 2 * i, 3), np.uint8)
        turned = Image.Exif()
        turned[0x0112] = 6 if i == 7 else 1  # the published code does not turn pictures
        Image.fromarray(pixels).save(folder / f"{i}.png", exif=turned)
        records.append({"id": i, "image": f"{i}.png", "conversations": turns("a thing " * (i + 1))})
    for name, frames in (("long", 100), ("short", 5)):
        make_clip(folder / f"{name}.mp4", frames)
        records.append({"id": name, "video": f"{name}.mp4", "conversations": turns("a clip", "<video>\nWhat?")})
    records += [{"id": f"t{i}", "conversations": turns("no picture " * i + ".", "What is it?")} for i in range(7)]
    both = turns("they differ", "<image> and <image>")
    records.append({"id": "two", "image": ["3.png", "4.png"], "conversations": both})
    (folder / "records.json").write_text(json.dumps(records))
    return folder


def make(folder, model=TINY, tok=None, records=None, **settings):
    file = folder / "records.json"
    if records is not None:
        file = folder / "others.json"
        file.write_text(json.dumps(records))
    settings = {"batch_size": 4, "max_length": 256, "buckets": (96, 128, 192), "threads": 3, "prefetch": 2} | settings
    config = DataConfig(sources=(SourceConfig(str(file)),), **settings)
    return TrainData(config, model, tok or tokenizer(), cache=folder / "cache", progress=False)


def load(data, rows=None, start=0):
    with data.batches(np.arange(data.config.batch_size) if rows is None else rows, start) as batches:
        return list(batches)


def assert_equal(a, b):
    assert (a.index, a.bucket) == (b.index, b.bucket)
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert array.dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)


def examples(data, batches):
    """(record of the mixture, batch, row) for every slot in use."""
    for batch in batches:
        for row, record in enumerate(data.plan[batch.index][1]):
            if record >= 0:
                yield int(record), batch, row


# Tokens and labels


def undo(arrays, row):
    """Token ids and labels of a row with at most one medium, from its arrays."""
    n = arrays["lengths"][row]
    vision = arrays["vision_index"][row, :n]
    ids = np.where(vision >= 0, IMAGE_TOKEN_ID, arrays["ids"][row, :n])
    labels = np.full(n + 1, IGNORE_LABEL)
    known = arrays["targets"][row] != IGNORE_LABEL
    labels[arrays["queries"][row][known] + 1] = arrays["targets"][row][known]
    keep = vision <= 0  # of a placeholder's positions the first
    return ids[keep].tolist(), labels[:n][keep].tolist()


@pytest.mark.parametrize("kind", ["llava_llama_3_1", "v1", "plain_llama3", "plain_vicuna"])
@pytest.mark.parametrize("size", ["tiny", "tiny-llava-v1.5"])
def test_golden_ids_and_labels(kind, size, folder, tmp_path):
    entries = [entry for name, entry in GOLDEN.items() if name.split("/")[0] == kind]
    media = {"image": {"image": str(folder / "0.png")}, "video": {"video": str(folder / "long.mp4")}, None: {}}
    records = [{"id": i, "conversations": e["conversations"], **media[e["kind"]]} for i, e in enumerate(entries)]
    template = "plain" if kind.startswith("plain") else kind
    model = named_sizes()[size]
    tok = tokenizer("vicuna" if kind in ("v1", "plain_vicuna") else "llama3")
    data = make(tmp_path, model, tok, records, template=template, video_frames=3, batch_size=2)
    found = {}
    for record, batch, row in examples(data, load(data)):
        assert batch.arrays["used"][row] == 1
        found[record] = undo(batch.arrays, row)
    assert found == {i: (e["input_ids"], e["labels"]) for i, e in enumerate(entries)}
    assert (
        all((b.fused > 1) == (b.images > 0 and model.prefusion_layers > 0) for b in data.plan.buckets) or template == "plain"
    )


def test_arrays_are_those_of_the_layout(folder):
    model = dataclasses.replace(TINY, compressor=CompressorConfig(size=2))
    data = make(folder, model)
    for batch in load(data):
        bucket, numbers = data.plan[batch.index]
        located = [data.locate(int(r)) for r in numbers[numbers >= 0]]
        records = [source.record(i) for source, i in located]
        pairs = [encode(r, "v1", tokenizer()) for r in records]
        images = [(8 if r.is_video else 1,) * len(r.media) for r in records]
        rows = [Row(ids, n, labels) for (ids, labels), n in zip(pairs, images)]
        layout = lay_out(rows, model, length=bucket.length, fused=bucket.fused)
        first = np.arange(len(rows))[:, None] * bucket.images * model.tokens_per_image
        expected = {
            "ids": layout.ids,
            "fused_index": layout.fused_index,
            "fused_ids": layout.fused_ids,
            "lengths": layout.lengths,
        }
        expected["vision_index"] = np.where(layout.vision_index < 0, -1, layout.vision_index - first)
        for name, array in expected.items():
            np.testing.assert_array_equal(batch.arrays[name][: len(rows)], array, err_msg=name)
        for row, labels in enumerate(layout.labels):
            queries = np.flatnonzero(labels[1:] != IGNORE_LABEL)
            padded = np.pad(queries, (0, bucket.targets - len(queries)), constant_values=bucket.length - 1)
            assert batch.arrays["queries"][row].tolist() == padded.tolist()
            targets = batch.arrays["targets"][row]
            assert targets[: len(queries)].tolist() == labels[queries + 1].tolist()
            assert (targets[len(queries) :] == IGNORE_LABEL).all()
        empty = {name: array[len(rows) :] for name, array in batch.arrays.items()}
        assert not any(empty[name].any() for name in ("ids", "fused_ids", "lengths", "used", "skipped"))
        assert (empty["targets"] == IGNORE_LABEL).all() and (empty["vision_index"] == -1).all()
        assert ("pixels" in empty) == (bucket.images > 0) and not empty.get("pixels", np.zeros(0)).any()


# Pictures and videos


@pytest.mark.parametrize("size, ratio", [("tiny", "pad"), ("tiny-hd", "square")])
def test_pictures_are_in_their_rows(size, ratio, folder):
    model = dataclasses.replace(named_sizes()[size], image_aspect_ratio=ratio)
    data = make(folder, model)
    seen = set()
    for record, batch, row in examples(data, load(data)):
        source, i = data.locate(record)
        if batch.bucket.images in (1, 2):
            paths = source.record(i).media
            settings = {"size": 56, "aspect_ratio": ratio, "resolution_ratio": model.resolution_ratio}
            expected = [preprocess(load_image(p, upright=False), **settings) for p in paths]
            assert batch.arrays["pixels"].shape[1:] == (len(paths), model.tiles, 56, 56, 3)
            np.testing.assert_array_equal(batch.arrays["pixels"][row], expected)
            seen.add(record)
    assert len(seen) == 21


def test_videos_give_exactly_the_frames_of_the_rule(folder):
    vision = dataclasses.replace(TINY.vision, image_size=196)
    data = make(folder, dataclasses.replace(TINY, vision=vision), video_frames=8)
    clips = {
        record: batch.arrays["pixels"][row] for record, batch, row in examples(data, load(data)) if batch.bucket.images == 8
    }
    numbers = [[number_of(frame[0]) for frame in clips[record]] for record in sorted(clips)]
    assert numbers == [frame_indices(100, 8).tolist(), frame_indices(5, 8).tolist()]


@pytest.fixture
def broken(folder, tmp_path):
    """Records of which each but the first and the last has something unreadable, and the reasons."""
    whole, clip = (folder / "3.png").read_bytes(), (folder / "long.mp4").read_bytes()
    files = {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.png": b"not a picture",
        "cut.mp4": clip[: len(clip) // 2],
        "text.mp4": b"not a video",
        "picture.mp4": whole,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    good = {"id": "good", "image": str(folder / "3.png"), "conversations": turns("yes")}
    clip = {"id": "clip", "video": str(folder / "long.mp4"), "conversations": turns("yes", "<video>")}
    names = [*files, "folder.png", "none.png", "none.mp4"]
    kinds = ["video" if name.endswith("mp4") else "picture" for name in names]
    key = {"video": "video", "picture": "image"}
    bad = [{"id": n, key[k]: n, "conversations": turns("yes")} for n, k in zip(names, kinds)]
    reasons = {n: f"{k} {'missing' if n.startswith('none') else 'unreadable'}" for n, k in zip(names, kinds)}
    second = {
        "id": "second.png",
        "image": [str(folder / "3.png"), "second.png"],
        "conversations": turns("yes", "<image><image>"),
    }
    return tmp_path, [good, *bad, second, clip], reasons | {"second.png": "picture missing"}


def test_a_row_whose_medium_is_unreadable_keeps_its_place_without_labels(broken):
    folder, records, reasons = broken
    data = make(folder, records=records, batch_size=12)
    batches = load(data)
    skipped = [s for batch in batches for s in batch.skipped]
    assert {s.id: s.reason for s in skipped} == reasons
    for s in skipped:
        assert s.media[-1] == str(folder / s.id) and s.id in s.detail and s.file == str(folder / "others.json")
        assert records[s.record]["id"] == s.id
    for record, batch, row in examples(data, batches):
        arrays, bad = batch.arrays, records[record]["id"] in reasons
        assert arrays["skipped"][row] == bad and arrays["used"][row] == (not bad)
        assert (arrays["targets"][row] != IGNORE_LABEL).any() == arrays["pixels"][row].any() == (not bad)
        assert arrays["lengths"][row] > 0 and (not bad or (arrays["queries"][row] == batch.bucket.length - 1).all())
    assert not data.skipped_beforehand  # media are not looked at before


def test_unusable_records_are_told_beforehand(folder, tmp_path):
    long = {"id": "long", "conversations": turns("word " * 300, "x")}
    records = [{"id": "a", "conversations": []}, long, {"id": "b", "conversations": turns("yes", "x")}, 5]
    config = DataConfig(sources=(SourceConfig(str(tmp_path / "r.json")),), batch_size=2, max_length=256, buckets=())
    (tmp_path / "r.json").write_text(json.dumps(records))
    data = TrainData(config, TINY, tokenizer(), cache=tmp_path, progress=False)
    assert data.records == 4 and data.sizes.record.tolist() == [2]
    assert [(s.record, s.id, s.reason) for s in data.skipped_beforehand] == [
        (0, "a", "empty conversation"),
        (1, "long", "longer than 256 positions"),
        (3, "", "malformed record"),
    ]
    assert data.reasons() == {s.reason: 1 for s in data.skipped_beforehand}


def test_a_record_may_be_exactly_as_long_as_allowed(folder):
    length = int(make(folder).sizes.length.max())
    assert make(folder, max_length=length, buckets=()).reasons() == {}
    assert make(folder, max_length=length - 1, buckets=()).reasons() == {f"longer than {length - 1} positions": 1}


def test_no_bucket_is_longer_than_allowed(folder):
    assert {bucket.length for bucket in make(folder, max_length=120).plan.buckets} == {96, 120}


# The same for everybody


def test_two_runs_are_equal_and_epochs_and_seeds_differ(folder):
    first = load(make(folder, epochs=2))
    for a, b in zip(first, load(make(folder, epochs=2, threads=1, prefetch=1)), strict=True):
        assert_equal(a, b)
    order = [batch.arrays["ids"].tolist() for batch in first]
    half = len(order) // 2
    assert order[:half] != order[half:]
    assert order != [batch.arrays["ids"].tolist() for batch in load(make(folder, epochs=2, seed=1))]


@pytest.mark.parametrize("hosts", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3], [0], [2], [1]], [[0, 1, 2], [3], []]])
def test_the_rows_of_all_hosts_are_the_whole_batch(hosts, folder):
    whole = load(make(folder))
    parts = [load(make(folder), np.array(rows, int)) for rows in hosts]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, array in batch.arrays.items():
            for rows, share in zip(hosts, shares):
                np.testing.assert_array_equal(share.arrays[name], array[rows], err_msg=name)
        assert all(share.bucket == batch.bucket for share in shares)


def test_a_run_continues_anywhere(folder):
    data = make(folder, epochs=2)
    whole = load(data)
    assert [batch.index for batch in whole] == list(range(len(data.plan)))
    for start in (0, 1, data.plan.steps_per_epoch - 1, data.plan.steps_per_epoch, len(whole) - 1, len(whole)):
        for a, b in zip(load(make(folder, epochs=2), start=start), whole[start:], strict=True):
            assert_equal(a, b)


def test_the_order_is_kept_when_a_row_is_slow(folder, monkeypatch):
    whole = load(make(folder))
    read = train_data.read_media

    def slow(record, *rest):
        time.sleep(0.1 if record.id in ("3", "long") else 0)
        read(record, *rest)

    monkeypatch.setattr(train_data, "read_media", slow)
    for a, b in zip(load(make(folder, threads=8, prefetch=4)), whole, strict=True):
        assert_equal(a, b)


def test_rows_are_loaded_ahead_and_in_parallel(folder, monkeypatch):
    at_once, most, seen = [], [0], []

    def slow(record, config, model, out):
        at_once.append(record)
        most[0] = max(most[0], len(at_once))
        time.sleep(0.1)
        at_once.pop()
        seen.append(record)

    monkeypatch.setattr(train_data, "read_media", slow)
    with make(folder, threads=8, prefetch=3).batches(np.arange(4)) as batches:
        next(batches)
        time.sleep(0.5)
        assert 4 < most[0] <= 8 and len(seen) > 4


def test_closing_early_ends_the_threads(folder):
    def ours():
        return [t for t in threading.enumerate() if t.name.startswith(("row", "grain"))]

    before = set(ours())
    batches = make(folder).batches(np.arange(4))
    next(batches)
    batches.close()
    batches.close()
    for _ in range(50):
        if not set(ours()) - before:
            break
        time.sleep(0.1)
    assert not set(ours()) - before


# What a user can get wrong


def test_a_tokenizer_of_another_model(folder):
    small = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, vocab_size=100))
    with pytest.raises(UserError, match="vocabulary has 100 tokens"):
        make(folder, small)


def test_no_usable_record(tmp_path):
    with pytest.raises(UserError, match=r"none of the 2 records can be trained on: empty conversation \(2\)"):
        make(tmp_path, records=[{"conversations": []}] * 2)
    with pytest.raises(UserError, match="none of the 0 records .* the files are empty"):
        make(tmp_path, records=[])


def test_counts_that_do_not_fit_any_more(folder, monkeypatch):
    data = make(folder)
    monkeypatch.setattr("lmm_jax.data.conversation._VICUNA_SYSTEM", "A system text of many more words. " * 20)
    with pytest.raises(UserError, match="not as it was when its tokens were counted"):
        load(data)


# The report


def test_the_report_names_a_record_once_also_after_a_kill(tmp_path):
    file = tmp_path / "run" / "skipped.jsonl"
    skipped = [Skipped("a.json", i, str(i), (f"{i}é\ud800.png",), "picture missing") for i in range(4)]
    report = SkipReport(file)
    for s in (*skipped[:2], skipped[0]):
        report(s)
    with file.open("a") as half:
        half.write('{"file": "a.json", "rec')
    report = SkipReport(file)
    for s in skipped[1:]:
        report(s)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert rows == [{**dataclasses.asdict(s), "media": list(s.media)} for s in skipped]


def test_what_is_known_beforehand_replaces_what_was(tmp_path):
    file = tmp_path / "skipped.jsonl"
    skipped = [Skipped("a.json", i, "\ud800", (), "empty conversation") for i in range(3)]
    write_skipped(file, skipped)
    write_skipped(file, skipped[1:])
    assert [json.loads(line)["record"] for line in file.read_text("utf-8").splitlines()] == [1, 2]


def test_the_fingerprint_is_that_of_content(folder, tmp_path):
    """Not of places."""
    first = make(folder)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert make(moved).fingerprint == first.fingerprint
    assert make(moved, seed=5).fingerprint == first.fingerprint  # a setting
    file = moved / "records.json"
    file.write_text(file.read_text().replace("no picture", "no pictuer", 1))
    assert make(moved).fingerprint != first.fingerprint

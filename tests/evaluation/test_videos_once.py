"""A video that several questions are about is decoded once; what the model sees is the same as without."""

import collections
import itertools
import json
import weakref

import numpy as np
import pytest
from evaluation.silent_engine import Engine
from support import GOLDEN

from lmm_jax.config import named_sizes
from lmm_jax.errors import DeviceError, UserError
from lmm_jax.evaluation import runner, runs
from lmm_jax.evaluation.benchmark import Benchmark, Record
from lmm_jax.inference import assistant as inference
from lmm_jax.inference.assistant import Assistant

BENCH = Benchmark("b", "B", "b", lambda folder: [], 1, "accuracy, %", lambda record, reply: record.row | {"text": reply})
SECONDS = 4


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips of four seconds and a folder of three frames."""
    import av
    from PIL import Image

    folder = tmp_path_factory.mktemp("clips")
    for name in "abc":
        with av.open(folder / f"{name}.mp4", "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height = 48, 32
            for i in range(5 * SECONDS):
                frame = np.full((32, 48, 3), (10 * i, ord(name), 90), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    (folder / "frames").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (60 * i, 9, 9)).save(folder / "frames" / f"{i}.png")
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    return folder


@pytest.fixture
def opened(monkeypatch):
    """How often each video was opened."""
    counts = collections.Counter()
    for name in ("stream_frames", "FrameFolder"):
        opener = getattr(inference, name)

        def counting(path, *args, opener=opener, **more):
            counts[str(path).rsplit("/", 1)[1]] += 1
            return opener(path, *args, **more)

        monkeypatch.setattr(inference, name, counting)
    return counts


def ask(clips, run, questions, *, size="tiny", **asking):
    """(What the model saw, the part file's rows), both by key; asked in the order of the videos."""
    records = [
        Record(key, f"question {key}?", video=str(clips / name), most_frames=most)
        for key, (name, most) in enumerate(questions)
    ]
    engine = Engine()
    asked = runner.Asking(progress=False, max_new_tokens=1, **asking)
    model = Assistant(GOLDEN / "text" / "vicuna_tokenizer", named_sizes()[size], engine)
    assert runner.answer(model, records, runs.Answers(run, BENCH), asked, "B") == len(records)
    rows = [json.loads(line) for line in (run / "b" / "part.1of1.jsonl").read_text().splitlines()]
    keys = [row["key"] for row in rows if not row["fault"]]
    return dict(zip(keys, engine.seen, strict=True)), {row["key"]: row for row in rows}


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        ((length, frames),), ((known, expected),) = one[key], other[key]
        assert length == known and len(frames) == len(expected)
        assert all(np.array_equal(a, b) for a, b in zip(frames, expected))


QUESTIONS = [("a.mp4", None), ("b", None), ("a.mp4", None), ("frames", None), ("b", None), ("c.mp4", None), ("a.mp4", None)]
QUESTIONS += [("frames", None), ("a.mp4", None), ("a.mp4", 2), ("a.mp4", 2)]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("size", ["tiny", "tiny-hd"])
def test_a_video_is_decoded_once(clips, opened, monkeypatch, tmp_path, batch_size, size):
    """Also where its questions are in several windows, as they are in batches of 1 or 2."""
    seen, _ = ask(clips, tmp_path / "one", QUESTIONS, batch_size=batch_size, size=size)
    assert opened == {"a.mp4": 2, "b.mp4": 1, "c.mp4": 1, "frames": 1}, "a.mp4 with and without a limit of frames"
    opened.clear()
    monkeypatch.setattr(runner, "_FRAME_BYTES", 0)
    expected, _ = ask(clips, tmp_path / "two", QUESTIONS, batch_size=batch_size, size=size)
    assert sum(opened.values()) > len(QUESTIONS), "without room each question decodes its own"
    same(seen, expected)
    assert [len(seen[key][0][1]) for key in (0, 1, 3, 9)] == [SECONDS, SECONDS, 3, 2]


def test_memory_is_bounded(clips, opened, monkeypatch, tmp_path):
    """Of a window, as many videos as there is room for."""
    frame = 3 * named_sizes()["tiny"].vision.image_size ** 2
    monkeypatch.setattr(runner, "_FRAME_BYTES", SECONDS * frame)
    questions = [(name, None) for name in ("a.mp4", "b.mp4") for _ in range(3)]
    ask(clips, tmp_path / "run", questions, batch_size=32, readers=1)
    assert opened == {"a.mp4": 1, "b.mp4": 1 + 3}, "a look at its size, and one for each question"


def test_no_video_is_kept_for_long(clips, opened, monkeypatch, tmp_path):
    """When a window is answered, those of the window before the last are gone."""
    given, answers = [], runner._answers

    def spy(assistant, window, read, asking):
        assert all(frames() is None for frames in itertools.chain(*given[:-1])), "kept for too long"
        given.append([weakref.ref(conversation.media[0][0]) for conversation in read])
        return answers(assistant, window, read, asking)

    monkeypatch.setattr(runner, "_answers", spy)
    ask(
        clips,
        tmp_path / "run",
        [(name, most) for most in (1, 2, 3, 4) for name in ("a.mp4", "b.mp4") for _ in "ab"],
        batch_size=2,
    )
    assert len(given) == 8 and sum(opened.values()) == 8


def test_a_video_that_cannot_be_read_is_a_fault_of_its_questions(clips, tmp_path):
    questions = [("broken.mp4", None), ("a.mp4", None), ("broken.mp4", None), ("a.mp4", None), ("nowhere", None)]
    seen, rows = ask(clips, tmp_path / "run", questions)
    assert set(seen) == {1, 3} and set(rows) == set(range(5))
    assert all("broken.mp4" in rows[key]["fault"] for key in (0, 2)) and "nowhere" in rows[4]["fault"]


def test_of_a_video_with_damaged_frames_the_others_are_kept(clips, monkeypatch, tmp_path):
    opener = inference.stream_frames

    class Short:
        def __init__(self, stream):
            self._stream = stream

        def __len__(self):
            return len(self._stream)

        def __iter__(self):
            return iter(list(self._stream)[:-1])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._stream.close()

    monkeypatch.setattr(inference, "stream_frames", lambda *args, **more: Short(opener(*args, **more)))
    seen, _ = ask(clips, tmp_path / "one", [("a.mp4", None)] * 2)
    alone, _ = ask(clips, tmp_path / "two", [("a.mp4", None)])
    ((_, streamed),) = alone[0]
    for ((_, kept),) in seen.values():
        assert len(kept) == SECONDS - 1 and all(map(np.array_equal, kept, streamed))


def test_a_batch_that_fails_is_halved_with_its_frames(clips, opened, monkeypatch, tmp_path):
    whole = Engine.as_completed

    def failing(self, requests, stop_ids, batch_size):
        if len(requests) > 1:
            raise UserError("too much at once")
        yield from whole(self, requests, stop_ids, batch_size)

    monkeypatch.setattr(Engine, "as_completed", failing)
    seen, rows = ask(clips, tmp_path / "run", [("a.mp4", None)] * 4)
    assert opened == {"a.mp4": 1} and not any(row["fault"] for row in rows.values())
    assert [len(frames) for ((_, frames),) in seen.values()] == [SECONDS] * 4


def test_a_device_that_fails_is_no_fault_of_the_questions(clips, opened, monkeypatch, tmp_path):
    whole = Engine.as_completed

    def failing(self, requests, stop_ids, batch_size):
        yield from whole(self, requests[:1], stop_ids, batch_size)
        raise DeviceError("the device failed: it has gone")

    monkeypatch.setattr(Engine, "as_completed", failing)
    with pytest.raises(DeviceError, match="it has gone"):
        ask(clips, tmp_path / "run", [("a.mp4", None)] * 4)
    rows = [json.loads(line) for line in (tmp_path / "run" / "b" / "part.1of1.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and not rows[0]["fault"]  # the others are asked at the next start

"""Words, messages and uploads, each by itself."""

import asyncio
import time

import pytest

import lmm_jax
from lmm_jax.errors import UserError
from lmm_jax.inference.words import Words
from lmm_jax.serve import schema
from lmm_jax.serve.errors import ApiError
from lmm_jax.serve.files import FileStore
from lmm_jax.serve.limits import Limits
from lmm_jax.serve.media import told

PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}
CLIP = {"type": "video_url", "video_url": {"url": "data:,"}}


@pytest.fixture(scope="module")
def tokenizer():
    return lmm_jax.load().tokenizer


def spoken(tokenizer, text, stops, size):
    ids, words, got = list(tokenizer.encode_text(text)), Words(tokenizer, {0}, stops), []
    for start in range(0, len(ids), size):
        if not words.is_stopped:
            got.append(words.push(ids[start : start + size]))
    return [*got, words.flush()]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("  a red circle \n", [], "a red circle"),
        ("a red circle is left", ["is"], "a red circle"),
        ("a red circle is left", [" red", "circle"], "a"),
        ("a red circle is left", ["circus", "lefty"], "a red circle is left"),
        ("aaab", ["aab"], "a"),
        ("naïve ☃ snow", ["☃"], "naïve"),
        ("\n\nred", ["\n"], ""),
    ],
)
def test_words_end_at_stop_texts(tokenizer, text, stops, expected, size):
    pieces = spoken(tokenizer, text, stops, size)
    assert "".join(pieces) == expected
    for n in range(len(pieces)):
        assert expected.startswith("".join(pieces[:n]))


def turns(*messages):
    return [schema.Turn(role=role, content=content) for role, content in messages]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("What?", "What?"),
        ([{"type": "text", "text": "What?"}, PICTURE], "<image>\nWhat?"),
        ([PICTURE, {"type": "text", "text": "What?"}, CLIP], "<image>\n<image>\nWhat?"),
        (
            [{"type": "text", "text": "First:"}, PICTURE, {"type": "text", "text": "then:"}, PICTURE],
            "First:\n<image>\nthen:\n<image>",
        ),
        ([{"type": "text", "text": "In <image> what?"}, PICTURE], "In <image> what?"),
        ([PICTURE], "<image>\n"),
        (None, ""),
    ],
)
def test_media_stand_where_they_were_put(content, expected):
    (message,), media = told(turns(("user", content)))
    assert message.content == expected and len(media) == expected.count("<image>")


def test_turns_of_one_role_are_one():
    said, _ = told(turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("developer", "d"), ("user", "c"), ("user", "e")))
    assert [(m.role, m.content) for m in said] == [("user", "s\na"), ("assistant", "b"), ("user", "d\nc\ne")]


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "a"), ("assistant", "b")],
        [("user", "two <image> <image>")],
        [("user", "a"), ("assistant", [PICTURE]), ("user", "b")],
    ],
)
def test_wrong_turns(messages):
    with pytest.raises(UserError):
        told(turns(*messages))


async def pieces(*content):
    for piece in content:
        yield piece


def test_uploads_go_when_their_time_is_over_and_nobody_reads_them(tmp_path, monkeypatch):
    async def use():
        store = FileStore(tmp_path, Limits(file_seconds=100))
        file = await store.add("a.png", "vision", pieces(b"12", b"345"))
        assert file.bytes == 5 and store.get(file.id).path.read_bytes() == b"12345"
        later = time.time() + 101
        with store.get(file.id) as upload:
            monkeypatch.setattr(time, "time", lambda: later)
            assert store.all() == []
            with pytest.raises(ApiError, match="no file"):
                store.get(file.id)
            assert upload.path.read_bytes() == b"12345"
        assert list(tmp_path.iterdir()) == []

    asyncio.run(use())


def test_an_upload_that_fails_leaves_nothing(tmp_path):
    async def breaks():
        yield b"12"
        raise OSError("the client left")

    async def use():
        store = FileStore(tmp_path, Limits(file_mb=1e-5, files_mb=1.5e-5))
        for content, kind in ((breaks(), OSError), (pieces(b"x" * 11), ApiError), (pieces(), ApiError)):
            with pytest.raises(kind):
                await store.add("a", "b", content)
        await store.add("a", "b", pieces(b"x" * 10))
        with pytest.raises(ApiError, match="all files together"):
            await store.add("a", "b", pieces(b"x" * 6))
        assert len(list(tmp_path.iterdir())) == len(store.all()) == 1

    asyncio.run(use())

"""Decoding in processes of their own: what strangers send may crash them, not the server."""

import asyncio
import contextlib
import gc
import io
import multiprocessing
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import lmm_jax
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Video
from lmm_jax.serve import decoding
from lmm_jax.serve.decoding import Clip, Decoders
from lmm_jax.serve.limits import Limits


@pytest.fixture(scope="module")
def model():
    return lmm_jax.load()


@pytest.fixture
def decoders(model):
    """Limits -> decoders."""
    made = []

    def make(**limits):
        made.append(Decoders(model.config, Limits(**{"decoders": 1, **limits})))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def workers(model):
    """Decoders that are started once for several tests."""
    made = Decoders(model.config, Limits(decoders=1))
    yield made
    made.close()


def crash():
    os._exit(7)


def hang():
    while True:
        pass


def swallow():
    return len(bytearray(20 * 10**9))


def bomb():
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_pictures_and_videos_are_those_of_the_model(model, decoders, media, tmp_path):
    pixels = asyncio.run(decoders().picture(media / "shapes.png"))
    np.testing.assert_array_equal(pixels, model.read_picture(str(media / "shapes.png")))
    frames = asyncio.run(decoders().video(media / "moving.mp4", Clip(2.0, 1.0), tmp_path / "frames"))
    expected = model.read_video(Video(media / "moving.mp4", start=1.0, fps=2.0))
    np.testing.assert_array_equal(np.stack(frames), np.stack(expected))
    few = asyncio.run(decoders(frames=2).video(media / "moving.mp4", Clip(), tmp_path / "few"))
    assert len(few) == 2


def test_workers_that_crash_hang_or_swallow_memory_are_replaced(decoders, media):
    workers = decoders(image_seconds=10.0)

    async def attack():
        with pytest.raises(UserError, match="crashed .status 7"):
            await workers._run("picture", 10.0, crash)
        with pytest.raises(UserError, match="longer than 0.5 seconds"):
            await workers._run("video", 0.5, hang)
        with pytest.raises(UserError, match="too much memory"):
            await workers._run("picture", 10.0, swallow)
        return await workers.picture(media / "shapes.png")

    assert asyncio.run(attack()).dtype == np.uint8


def test_a_worker_that_dies_while_it_has_nothing_to_do(decoders, media):
    workers = decoders(decoders=2)

    async def attack():
        await workers.picture(media / "shapes.png")
        for worker in multiprocessing.active_children():
            worker.kill()
        await asyncio.sleep(0.5)
        return await workers.picture(media / "shapes.png")

    assert asyncio.run(attack()).dtype == np.uint8


def test_frames_count_as_long_as_somebody_has_them(decoders, media, tmp_path):
    workers = decoders()
    frames = asyncio.run(workers.video(media / "moving.mp4", Clip(), tmp_path / "frames"))
    assert workers.held == sum(frame.nbytes for frame in frames)
    one = frames.pop()
    del frames
    assert workers.held > 0
    del one
    gc.collect()
    assert workers.held == 0


def test_a_client_that_leaves_stops_its_decoder(decoders, media):
    workers = decoders()

    async def leave():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                await workers._run("video", 600.0, hang)
        async with asyncio.timeout(30):
            return await workers.picture(media / "shapes.png")

    assert asyncio.run(leave()) is not None


@pytest.mark.parametrize("name", ["bomb", "cut", "gif", "text", "svg", "empty", "playlist"])
def test_malicious_files(workers, media, tmp_path, name):
    whole = (media / "shapes.png").read_bytes()
    animation = io.BytesIO()
    Image.new("P", (30_000, 30_000)).save(animation, "GIF")
    content = {
        "bomb": bomb(),
        "cut": whole[: len(whole) // 2],
        "gif": animation.getvalue(),
        "text": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "empty": b"",
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    }[name]
    (tmp_path / "file").write_bytes(content)

    async def read():
        with pytest.raises(UserError, match="the picture"):
            await workers.picture(tmp_path / "file")
        if name != "gif":
            with pytest.raises(UserError, match="the video"):
                await workers.video(tmp_path / "file", Clip(), tmp_path / "frames")

    asyncio.run(read())


def test_messages_hold_no_path(tmp_path):
    told = decoding._nameless(UserError(f"{tmp_path}/x is broken"), tmp_path / "x", "the video")
    assert str(told) == "the video is broken"

import gc
import json
import pathlib
import threading
import time
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest

from lmm_jax.data import video
from lmm_jax.data.image import squash
from lmm_jax.data.video import frame_count, frame_indices, stream_frames, take_frames
from lmm_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "preprocessing"
WIDTH, HEIGHT, BITS = 192, 48, 12
REORDERED = {"g": "40", "bf": "3"}  # key frames at irregular distances (scene cuts), frames stored out of order
COARSE = {"g": "250", "bf": "3", "sc_threshold": "0"}


def numbered(number):
    """A picture with its number in twelve black or white bars."""
    pixels = np.full((HEIGHT, WIDTH, 3), number * 5 % 200, np.uint8)
    for bit in range(BITS):
        pixels[:, bit * 16 : bit * 16 + 16] = 235 if number >> bit & 1 else 20
    return pixels


def number_of(pixels):
    height, width = pixels.shape[:2]
    return sum(int(pixels[height // 2, int((bit + 0.5) * width / BITS)].mean() > 128) << bit for bit in range(BITS))


def make_clip(path, frames=100, fps=25, codec="libx264", options=None, metadata=None, pix_fmt="yuv420p", **container):
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"no encoder {codec}")
    with av.open(str(path), "w", **container) as file:
        file.metadata.update(metadata or {})
        stream = file.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def make_sound(path, codec="aac"):
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """100 frames, 4 seconds."""
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", options=REORDERED)


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """1500 frames, 1 minute."""
    return make_clip(tmp_path_factory.mktemp("clips") / "long.mp4", 1500, options=COARSE)


def decoder_threads():
    return [thread for thread in threading.enumerate() if thread.name == "video decoder"]


def test_frame_indices_equal_the_published_ones():
    for case, indices in json.loads((GOLDEN / "frame_indices.json").read_text()).items():
        got = frame_indices(*map(int, case.split(",")))
        assert got.dtype == np.int64 and got.tolist() == indices


def test_a_short_video_gives_its_middle_frame():
    assert [frame_indices(total, 0).tolist() for total in (1, 2, 7, 24)] == [[0], [0], [3], [11]]
    for total, wanted in ((0, 1), (5, -1)):
        with pytest.raises(UserError, match=f"{wanted} frames of a video of {total}"):
            frame_indices(total, wanted)


@pytest.mark.parametrize(
    "total, rate, fps, count",
    [
        (315, Fraction(30000, 1001), 1, 10),
        (30000, Fraction(30000, 1001), 1, 1001),
        (24, 25, 1, 0),
        (25, 25, 1, 1),
        (700, 10, Fraction("0.1"), 7),
        (100, 25, 1000, 100),
    ],
)
def test_frame_count(total, rate, fps, count):
    assert frame_count(total, Fraction(rate), Fraction(fps)) == count


FORMATS = {
    "mp4": {"options": REORDERED},
    "mkv": {"options": REORDERED},
    "ts": {"options": REORDERED},
    "flv": {"options": REORDERED},
    "avi": {"options": REORDERED},  # knows no order of showing
    "h264": {"options": REORDERED},  # knows no times at all
    "mpg": {"codec": "mpeg2video", "options": {"g": "15", "bf": "2"}},
    "mov": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "webm": {"codec": "libvpx-vp9", "options": {"g": "40", "deadline": "realtime", "cpu-used": "8"}},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_right_frames_of_every_container(kind, tmp_path):
    path = make_clip(tmp_path / f"clip.{kind}", **FORMATS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fps, indices in ((1, frame_indices(100, 4)), (1000, frame_indices(100, 100)), (0.01, [49])):
            stream = stream_frames(path, size=192, fps=fps)
            assert len(stream) == len(indices) and not decoder_threads()
            frames = list(stream)
            assert {(f.shape, f.dtype.name) for f in frames} == {((192, 192, 3), "uint8")}
            assert [number_of(f) for f in frames] == list(indices)
        few = list(stream_frames(path, size=192, fps=1000, most=3))
        assert [number_of(f) for f in few] == frame_indices(100, 3).tolist()
        middle = stream_frames(path, size=192, start=2, end=3.5, fps=2)
        assert [number_of(f) for f in middle] == list(50 + frame_indices(38, 3))


def test_frames_are_squashed_as_decoded(clip):
    with av.open(str(clip)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    for got, index in zip(stream_frames(clip, size=56, fps=2), frame_indices(100, 8)):
        np.testing.assert_array_equal(got, squash(frames[index], 56))


def test_time_range(clip):
    def numbers(**given):
        return [number_of(frame) for frame in stream_frames(clip, size=192, fps=25, **given)]

    assert numbers(start=1, end=1.04) == [25]  # the first second is over when frame 25 comes
    assert numbers(start=0.97, end=1.01) == [25]
    assert numbers(start=1, end=1.2) == [25, 26, 27, 27, 28]
    assert numbers(end=0.04) == [0]
    assert numbers(start=3.96) == numbers(start=3.95, end=1e12) == [99]


def test_files_whose_clock_does_not_start_at_zero(tmp_path):
    late = make_clip(tmp_path / "late.ts", options=REORDERED, container_options={"output_ts_offset": "5000"})
    assert [number_of(f) for f in stream_frames(late, size=192, start=1, end=1.04)] == [25]


def count_decoded(monkeypatch):
    decoded = []
    decode = video._frames

    def counting(packet):
        frames = decode(packet)
        decoded.extend(frame.pts for frame in frames)
        return frames

    monkeypatch.setattr(video, "_frames", counting)
    return decoded


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("given", [{"fps": 0.1}, {"start": 47, "end": 49}, {"fps": 0.06, "start": 20}])
def test_seeking_gives_the_same_frames_as_decoding_everything(kind, given, tmp_path, monkeypatch):
    path = make_clip(tmp_path / f"long.{kind}", 1500, options=COARSE)
    decoded = count_decoded(monkeypatch)
    sought = list(stream_frames(path, size=56, **given))
    few = len(decoded)
    monkeypatch.setattr(video, "_MIN_JUMP", 10**9)
    everything = list(stream_frames(path, size=56, **given))
    assert few < 0.7 * (len(decoded) - few)
    np.testing.assert_array_equal(sought, everything)


def test_dense_frames_are_decoded_once(long_clip, monkeypatch):
    decoded = count_decoded(monkeypatch)
    numbers = [number_of(frame) for frame in stream_frames(long_clip, size=192)]
    assert numbers == frame_indices(1500, 60).tolist()
    assert len(decoded) == len(set(decoded))


def test_frames_that_seeking_misses_are_found_by_decoding(tmp_path, monkeypatch):
    path = make_clip(tmp_path / "long.ts", 1500, options=COARSE)
    monkeypatch.setattr(video, "_DECODING_LEAD", 0)  # lands behind the key frame
    decoded = count_decoded(monkeypatch)
    assert [number_of(frame) for frame in stream_frames(path, size=192, fps=0.1)] == frame_indices(1500, 6).tolist()
    assert len(decoded) > 1300


def test_a_clock_that_is_set_back(tmp_path):
    parts = [make_clip(tmp_path / f"{i}.ts", options=REORDERED).read_bytes() for i in range(2)]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    numbers = [number_of(frame) for frame in stream_frames(tmp_path / "joined.ts", size=192, fps=5)]
    assert len(numbers) == 40 and numbers[:20] == sorted(numbers[:20]) and numbers[20:] == sorted(numbers[20:])
    assert numbers[19] > 90 and numbers[20] < 10


def test_hidden_reference_frames_are_not_counted(tmp_path):
    """VP8: a packet whose frame is decoded and never shown."""
    source = make_clip(tmp_path / "plain.webm", codec="libvpx", options={"g": "40"})
    path = tmp_path / "hidden.webm"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if not packet.size:
                continue
            if packet.pts in (1000, 2000):
                data = bytearray(bytes(packet))
                data[0] &= ~0x10
                hidden = av.Packet(bytes(data))
                hidden.pts, hidden.dts, hidden.time_base, hidden.stream = packet.pts, packet.dts, packet.time_base, stream
                packet = hidden
            packet.stream = stream
            new.mux(packet)
    shown = [n for n in range(100) if n not in (25, 50)]
    stream = stream_frames(path, size=192, fps=1000)
    assert len(stream) == 98
    assert [number_of(frame) for frame in stream] == [shown[i] for i in frame_indices(98, 98)]


@pytest.mark.parametrize("turn, matrix", [(-1, (0, 1, -1, 0)), (1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1))])
def test_rotation_of_phone_videos(turn, matrix, clip, tmp_path):
    data = bytearray(clip.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (np.array(matrix) * 65536).astype(">i4")
    data[at : at + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    with av.open(str(clip)) as file:
        middle = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)][49]
    (upright,) = stream_frames(path, size=56, fps=0.1)
    (as_stored,) = stream_frames(path, size=56, fps=0.1, upright=False)
    np.testing.assert_array_equal(upright, squash(np.rot90(middle, turn), 56))
    np.testing.assert_array_equal(as_stored, squash(middle, 56))


def test_stopping_early_leaves_no_thread(long_clip):
    def started():
        stream = stream_frames(long_clip, size=56, fps=25)
        next(stream)
        assert len(decoder_threads()) == 1
        return stream

    stream = started()
    stream.close()
    assert not decoder_threads() and list(stream) == []
    stream.close()
    with started():
        pass
    assert not decoder_threads()
    for _ in stream_frames(long_clip, size=56, fps=25):
        break
    gc.collect()
    assert not decoder_threads()
    stream_frames(long_clip, size=56).close()
    sparse = started()
    time.sleep(0.2)  # the queue is full now and the thread waits
    del sparse
    gc.collect()
    assert not decoder_threads()


def test_only_a_few_frames_are_held(long_clip, monkeypatch):
    made = []
    monkeypatch.setattr(video, "squash", lambda frame, size: made.append(0) or squash(frame, size))
    most = video.FRAMES_AHEAD + 1  # a full queue and the frame that waits for a place in it
    with stream_frames(long_clip, size=56, fps=25) as stream:
        next(stream)
        deadline = time.monotonic() + 60
        while len(made) < 1 + most and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(made) == 1 + most
        assert all(len(made) - taken <= most for taken, _ in enumerate(stream, 2))
    assert len(made) == 1500


def test_a_file_cut_short(tmp_path):
    plain = make_clip(tmp_path / "plain.mp4", options=REORDERED).read_bytes()
    (tmp_path / "headless.mp4").write_bytes(plain[: len(plain) * 6 // 10])
    with pytest.raises(UserError, match="headless.mp4 cannot be read as a video"):
        stream_frames(tmp_path / "headless.mp4", size=56)
    fast = make_clip(tmp_path / "fast.mp4", options=REORDERED, container_options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "half.mp4").write_bytes(fast[: len(fast) * 6 // 10])
    with pytest.warns(UserWarning, match="half.mp4 seems cut short: it says 4.0 s"):
        stream = stream_frames(tmp_path / "half.mp4", size=192)
    assert 1 <= len(stream) <= 2
    numbers = [number_of(frame) for frame in stream]
    assert len(numbers) == len(stream) and numbers[0] < 50


def overwrite(path, source, first, last):
    """Zeroes a part of the coded pictures, given as fractions."""
    data = bytearray(source.read_bytes())
    start, size = data.index(b"mdat") + 4, int.from_bytes(data[data.index(b"mdat") - 4 :][:4]) - 8
    low, high = (start + int(size * fraction) for fraction in (first, last))
    data[low:high] = bytes(high - low)
    path.write_bytes(data)
    return path


def test_damaged_frames_are_left_out_and_counted(clip, tmp_path):
    stream = stream_frames(overwrite(tmp_path / "damaged.mp4", clip, 0.4, 0.9), size=192, fps=5)
    with pytest.warns(UserWarning, match=r"damaged.mp4 is damaged: \d+ of 20 frames could not be decoded"):
        numbers = [number_of(frame) for frame in stream]
    assert 3 <= len(numbers) < 20 == len(stream)
    assert numbers[:3] == frame_indices(100, 20)[:3].tolist()


@pytest.mark.parametrize("total, wanted", [(100, 8), (100, 1), (100, 100), (9, 8), (5, 8), (1, 3)])
def test_exactly_so_many_frames(total, wanted, tmp_path):
    frames = take_frames(make_clip(tmp_path / "clip.mp4", total, options=REORDERED), size=192, frames=wanted)
    assert frames.shape == (wanted, 192, 192, 3) and frames.dtype == np.uint8
    assert [number_of(frame) for frame in frames] == frame_indices(total, wanted).tolist()


def test_exactly_so_many_frames_or_none(clip, tmp_path):
    with pytest.raises(UserError, match=r"damaged.mp4 is damaged: \d of 8 frames could not be decoded"):
        take_frames(overwrite(tmp_path / "damaged.mp4", clip, 0.4, 0.9), size=56, frames=8)
    fast = make_clip(tmp_path / "fast.mp4", options=REORDERED, container_options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "half.mp4").write_bytes(fast[: len(fast) * 6 // 10])
    with pytest.raises(UserError, match="half.mp4 seems cut short: it says 4.0 s"):
        take_frames(tmp_path / "half.mp4", size=56, frames=8)


def test_no_frame_can_be_decoded(clip, tmp_path):
    stream = stream_frames(overwrite(tmp_path / "destroyed.mp4", clip, 0, 1), size=56)
    with pytest.raises(UserError, match="not a single frame of .*destroyed.mp4"):
        list(stream)
    assert not decoder_threads()


def test_an_error_in_the_thread_reaches_the_caller(clip, tmp_path):
    path = tmp_path / "copy.mp4"
    path.write_bytes(clip.read_bytes())
    stream = stream_frames(path, size=56)
    path.unlink()
    with pytest.raises(UserError, match="copy.mp4 cannot be read as a video"):
        list(stream)
    assert not decoder_threads()


def test_bad_files(tmp_path, clip):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("This is not a video. " * 100)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{clip}\n#EXT-X-ENDLIST\n")
    make_clip(tmp_path / "picture.png", frames=1, codec="png", pix_fmt="rgb24", format="image2")
    cases = {
        "missing.mp4": "missing.mp4 does not exist",
        "": "is not a file; give the path of a video",
        "empty.mp4": "empty.mp4 is empty",
        "text.mp4": "text.mp4 cannot be read as a video",
        "list.m3u8": "list.m3u8 cannot be read as a video",
        "picture.png": "picture.png cannot be read as a video",
        make_sound(tmp_path / "sound.m4a").name: "sound.m4a holds no moving pictures",
        make_sound(tmp_path / "sound.wav", "pcm_s16le").name: "sound.wav cannot be read as a video",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            stream_frames(tmp_path / name, size=56)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"start": 2, "end": 2}, "from 2 s to 2 s cannot"),
        ({"start": 3, "end": 1}, "from 3 s to 1 s cannot"),
        ({"start": -1}, "from -1 s on cannot"),
        ({"end": 0}, "cannot be taken"),
        ({"start": 4}, "has no frame from 4 s on: it is 4.00 s long"),
        ({"start": 1.01, "end": 1.02}, "has no frame from 1.01 s to 1.02 s"),
        ({"start": float("nan")}, "start is nan"),
        ({"end": float("inf")}, "end is inf"),
        ({"fps": 0}, "fps is 0, it must"),
        ({"fps": -1.5}, "fps is -1.5"),
        ({"most": 0}, "at most 0 frames"),
        ({"fps": float("nan")}, "fps is nan"),
    ],
)
def test_bad_choices(clip, given, message):
    with pytest.raises(UserError, match=message):
        stream_frames(clip, size=56, **given)


def test_absurd_frame_sizes(clip, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(UserError, match="frames of 192x48 pixels; at most 9,215"):
        stream_frames(clip, size=56)


def test_names_and_titles_that_are_not_plain_text(clip, tmp_path):
    path = make_clip(tmp_path / "a:b%d ü.mkv", metadata={"title": "TITLE"})
    path.write_bytes(path.read_bytes().replace(b"TITLE", b"\xff\xfeT\xc3("))
    assert len(list(stream_frames(path, size=56))) == 4

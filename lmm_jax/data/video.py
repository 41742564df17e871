"""Videos: a file -> the frames the published rule chooses, streamed (spec section 6).

A first pass reads the packets without decoding them and learns when every frame is shown; so the number of frames is known
before the first is decoded, and a frame can be sought. A thread then decodes ahead into a short queue: memory does not grow
with the length of the video (a timestamp per frame apart). F frames, H and W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import queue
import threading
import warnings
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from lmm_jax.data.image import existing_file, squash
from lmm_jax.errors import UserError

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

MAX_FRAME_PIXELS = 1 << 26  # 8192x8192; 8K video passes
FRAMES_AHEAD = 32  # 11 MB at 336 pixels

# FFmpeg also reads playlists, text files as animations, devices and lists of other files: only files that hold a video.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,asf,ogg,mxf,dv,nut,rm,wtv,gif,apng"

# A jump to a key frame drops what the decoder's threads have begun; below this many frames decoding through is as fast.
_MIN_JUMP = 32
_DECODING_LEAD = 16  # frames by which decoding may precede showing: the most reference frames a decoder keeps
_MAX_DISORDER = 2 * _DECODING_LEAD  # a packet further from its place in order of time means that the clock was set back
_Frames = Generator[np.ndarray, None, None]
_NO_TIME = np.iinfo(np.int64).min


def frame_indices(total: int, wanted: int) -> np.ndarray:
    """Which frames are taken from a video, by the published rule (spec section 6).

    Args:
      total: frames in the video.
      wanted: frames to take; 0, from a video shorter than a frame period, takes the middle one.

    Returns:
      int64 (F,), not decreasing; an index may come twice when nearly all frames are wanted.

    Raises:
      UserError: `total` is not positive or `wanted` is negative.
    """
    if total < 1 or wanted < 0:
        raise UserError(f"{wanted} frames of a video of {total} frames cannot be taken.")
    wanted = max(wanted, 1)
    edges = np.round(np.arange(wanted + 1) * ((total - 1) / wanted)).astype(np.int64)  # half to even
    return (edges[:-1] + edges[1:]) // 2


def frame_count(total: int, rate: Fraction, fps: Fraction) -> int:
    """How many of `total` frames shown at `rate` frames per second are taken to get `fps` of them per second.

    At most `total`; 0 when the video is shorter than 1/fps seconds.
    """
    return min(total, math.floor(total / rate * fps))


class FrameStream(Iterator[np.ndarray]):
    """The chosen frames of a video, uint8 (H, W, 3), in order and once. `len` is known from the start.

    Decoding begins with the first `next`. Close it, or use it as a context manager, when not all frames are taken: that ends
    the decoding thread and closes the file.

    Raises (while iterating):
      UserError: not a single frame could be decoded. When only some could not, the others come and a warning counts them.
    """

    def __init__(self, frames: _Frames, length: int) -> None:
        """Made by `stream_frames`."""
        self._frames = frames
        self._length = length

    def __len__(self) -> int:
        """How many frames were chosen (F)."""
        return self._length

    def __next__(self) -> np.ndarray:
        """The next frame, uint8 (H, W, 3)."""
        return next(self._frames)

    def close(self) -> None:
        """Stops decoding; no further frame comes. May be called at any time and more than once."""
        self._frames.close()

    def __enter__(self) -> FrameStream:
        """The stream itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Closes the stream."""
        self.close()


def stream_frames(
    path: str | os.PathLike,
    *,
    size: int,
    fps: float = 1.0,
    start: float | None = None,
    end: float | None = None,
    most: int | None = None,
    upright: bool = True,
) -> FrameStream:
    """Chooses frames of a video by the published rule and streams them, squashed to size x size (spec section 6).

    Args:
      path: a video file.
      size: H = W, the encoder's input in pixels.
      fps: frames to take per second of video, at the file's average rate.
      start, end: seconds after the first frame; only frames with start <= time < end count.
      most: frames to take at most, spread over the whole range; None: any number.
      upright: whether to turn the frames as the file says (videos of phones).

    Raises:
      UserError: the file is missing, empty, cut short before its index, not a video, without pictures or with pictures of
        more than `MAX_FRAME_PIXELS` pixels; the time range is empty or holds no frame; fps or most is not positive.
    """
    rate = _number("fps", fps)
    if rate <= 0:
        raise UserError(f"fps is {fps}, it must be more than 0.")
    if most is not None and most < 1:
        raise UserError(f"at most {most} frames are wanted, it must be at least 1.")
    index = _scan(existing_file(path, "video"))
    first, last = _range(index, start, end)
    count = frame_count(last - first, index.rate, rate)
    wanted = first + frame_indices(last - first, count if most is None else min(count, most))
    stop = threading.Event()
    frames = _ahead(_squashed(_decode(index, wanted, stop), size, upright), stop)
    return FrameStream(_counted(frames, index.path, len(wanted)), len(wanted))


def take_frames(path: str | os.PathLike, *, size: int, frames: int) -> np.ndarray:
    """Exactly so many frames of a whole video, by the published rule, upright and squashed to size x size (spec section 6).

    Returns:
      uint8 (F, H, W, 3), in order; of a video with fewer frames some come more than once.

    Raises:
      UserError: as `stream_frames`; also when the video is cut short or a chosen frame cannot be decoded.
    """
    index = _scan(existing_file(path, "video"), strict=True)
    wanted = frame_indices(len(index.times), frames)
    taken = list(_squashed(_decode(index, wanted, threading.Event()), size, upright=True))
    if len(taken) < len(wanted):
        raise UserError(f"{index.path} is damaged: {len(wanted) - len(taken)} of {len(wanted)} frames could not be decoded.")
    return np.stack(taken)


@dataclasses.dataclass(frozen=True)
class _Index:
    """When the frames of a file are shown."""

    path: str
    times: np.ndarray  # int64 (F,) increasing, in units of time_base
    end: int  # when the last frame ends
    time_base: Fraction  # seconds
    rate: Fraction  # frames per second, average
    timed: bool  # whether times are the file's own; otherwise frames are counted
    keys: np.ndarray  # int64, positions of the frames that can be sought; none when frames are counted

    @property
    def seconds(self) -> Fraction:
        return (self.end - int(self.times[0])) * self.time_base

    def position(self, frame: VideoFrame, following: int) -> int:
        """Which frame this is; `following` where frames are only counted."""
        if not self.timed or frame.pts is None:
            return following
        return int(np.searchsorted(self.times, frame.pts, "right")) - 1

    def aim(self, key: int, container: str) -> int:
        """The time to seek in order to read on from a key frame. Transport streams are searched by time of decoding."""
        return int(self.times[max(0, key - _DECODING_LEAD) if container == "mpegts" else key])

    def key_before(self, position: int) -> int:
        """The last key frame at or before a position; -1 where there is none."""
        found = np.searchsorted(self.keys, position, "right") - 1
        return int(self.keys[found]) if found >= 0 else -1


def _number(name: str, value: float) -> Fraction:
    try:
        return Fraction(str(value))  # 0.1 is meant as a tenth
    except ValueError:
        raise UserError(f"{name} is {value}, a number was expected.") from None


def _range(index: _Index, start: float | None, end: float | None) -> tuple[int, int]:
    """The first position with start <= time < end, and one past the last."""
    low = Fraction(0) if start is None else _number("start", start)
    high = index.seconds if end is None else _number("end", end)
    given = f"from {float(low):g} s " + ("on" if end is None else f"to {float(high):g} s")
    if low < 0 or (end is not None and low >= high):
        raise UserError(f"the time range {given} cannot be taken; give 0 <= start < end.")
    ticks = [int(index.times[0]) + math.ceil(min(t, index.seconds) / index.time_base) for t in (low, high)]
    first, last = (int(i) for i in np.searchsorted(index.times, ticks))
    if first == last:
        raise UserError(f"{index.path} has no frame {given}: it is {float(index.seconds):.2f} s long.")
    return first, last


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and the stream of pictures in it, ready to decode."""
    import av

    try:
        container = av.open(f"file:{path}", container_options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as a video: it is none, or it is broken or cut short ({reason}).") from error
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise UserError(f"{path} holds no moving pictures.")
        context = stream.codec_context
        if context is None:
            raise UserError(f"{path} holds pictures in a coding for which there is no decoder here.")
        if context.width * context.height > MAX_FRAME_PIXELS:
            size = f"{context.width}x{context.height}"
            raise UserError(f"{path} has frames of {size} pixels; at most {MAX_FRAME_PIXELS:,} are decoded.")
        context.thread_type = "AUTO"
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # a frame may be larger than the header says
        container.flags &= ~av.container.core.Flags.gen_pts.value  # made-up times are wrong where frames are out of order
        yield container, stream


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """What can be read; of a damaged file that is the beginning."""
    import av

    with contextlib.suppress(av.FFmpegError, IndexError):  # PyAV's IndexError: a stream that began in the middle has ended
        yield from container.demux(stream)


def _frames(packet: Packet) -> list[VideoFrame]:
    """What becomes ready with this packet: nothing when it is damaged."""
    import av

    try:
        return packet.decode()
    except av.FFmpegError:
        return []


def _scan(path: str, strict: bool = False) -> _Index:
    """Reads all packets of a video without decoding them. That it is cut short is an error when `strict`, else a warning."""
    with _opened(path) as (container, stream):
        shown = (p for p in _packets(container, stream) if _is_shown(p, stream.codec_context.name))
        table = np.fromiter(((_NO_TIME if p.pts is None else p.pts, p.duration or 0, p.is_keyframe) for p in shown), "i8,i8,?")
        promised = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 1_000_000)
        rate, time_base = stream.average_rate or stream.guessed_rate, stream.time_base
    if not len(table):
        raise UserError(f"{path} holds no frames.")
    index = _by_time(path, table, time_base, rate) or _by_count(path, rate)
    if index.seconds < promised - max(1, promised / 20):
        message = f"{path} seems cut short: it says {float(promised):.1f} s, its pictures last {float(index.seconds):.1f} s"
        if strict:
            raise UserError(message)
        warnings.warn(message, stacklevel=3)
    return index


def _is_shown(packet: Packet, codec: str) -> bool:
    if not packet.size or packet.is_discard:
        return False
    return codec != "vp8" or bool(memoryview(packet)[0] & 0x10)  # an alternate reference frame is a packet of its own


def _by_time(path: str, table: np.ndarray, time_base: Fraction, rate: Fraction | None) -> _Index | None:
    """The packets (time, duration, is key frame) in the order of their times; None where these are missing or impossible."""
    order = np.argsort(table["f0"], kind="stable")
    times, durations, is_key = (table[order][name] for name in ("f0", "f1", "f2"))
    disorder = np.abs(order - np.arange(len(order))).max()
    if times[0] == _NO_TIME or not np.all(np.diff(times)) or disorder > _MAX_DISORDER:
        return None
    rate = rate or max(len(times) - 1, 1) / max(int(times[-1] - times[0]), 1) / time_base
    end = int(times[-1]) + max(int(durations[-1]) or round(1 / rate / time_base), 1)
    return _Index(path, times, end, time_base, rate, True, np.flatnonzero(is_key))


def _by_count(path: str, rate: Fraction | None) -> _Index:
    """Without times, a packet may be a frame, half of one or none: only decoding tells how many frames there are."""
    if not rate:
        raise UserError(f"{path} tells neither when its frames are shown nor how many come per second; convert it to MP4.")
    with _opened(path) as (container, stream):
        total = sum(len(_frames(packet)) for packet in _packets(container, stream))
    if not total:
        raise UserError(f"not a single frame of {path} could be decoded; it is broken.")
    return _Index(path, np.arange(total), total, 1 / rate, rate, False, np.array([], np.int64))


def _find(index: _Index, wanted: np.ndarray, stop: threading.Event, seek: bool) -> Generator[VideoFrame, None, int]:
    """Decodes the frames at the wanted positions, jumping over stretches without one when `seek` is set.

    Returns:
      How many of `wanted` are settled: found, or known not to be decodable. Fewer than all when a jump may have lost one.
    """
    import av

    position = jumped = -1
    settled = 0
    with _opened(index.path) as (container, stream):
        for packet in _packets(container, stream):
            for frame in _frames(packet):
                position = index.position(frame, position + 1)
                while settled < len(wanted) and wanted[settled] <= position:
                    if wanted[settled] == position:
                        yield frame
                    elif jumped >= 0:
                        return settled
                    settled += 1
            if settled == len(wanted) or stop.is_set():
                return settled
            key = index.key_before(wanted[settled]) if seek else -1
            if key > max(position + _MIN_JUMP, jumped):
                try:
                    container.seek(index.aim(key, container.format.name), stream=stream)
                except av.FFmpegError:
                    return settled
                jumped = key
    return settled if jumped >= 0 else len(wanted)


def _decode(index: _Index, wanted: np.ndarray, stop: threading.Event) -> Iterator[VideoFrame]:
    """The frames at the wanted positions, without those that cannot be decoded."""
    settled = yield from _find(index, wanted, stop, seek=True)
    if settled < len(wanted) and not stop.is_set():
        yield from _find(index, wanted[settled:], stop, seek=False)


def _squashed(frames: Iterator[VideoFrame], size: int, upright: bool) -> _Frames:
    import av

    for frame in frames:
        try:
            pixels = frame.to_ndarray(format="rgb24")
        except av.FFmpegError as error:
            raise UserError(f"a frame of the video cannot be converted to RGB from {frame.format.name}.") from error
        turns = round(frame.rotation / 90) if upright else 0  # quarter turns against the clock
        yield squash(np.rot90(pixels, turns), size)


def _ahead(source: _Frames, stop: threading.Event) -> _Frames:
    """The items of `source`, made by a thread a few items ahead. Closing it sets `stop` and waits for the thread."""
    ready: queue.Queue[np.ndarray | BaseException | None] = queue.Queue(FRAMES_AHEAD)

    def work() -> None:
        end = None
        try:
            with contextlib.closing(source):
                for item in source:
                    ready.put(item)
                    if stop.is_set():
                        break
        except BaseException as error:
            end = error
        ready.put(end)

    thread = threading.Thread(target=work, name="video decoder", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while thread.is_alive():  # it may be waiting for a place in the queue
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.01)
        thread.join()


def _counted(frames: _Frames, path: str, expected: int) -> _Frames:
    """The same frames; afterwards complains about those that did not come."""
    came = 0
    with contextlib.closing(frames):
        for frame in frames:
            came += 1
            yield frame
    if not came:
        raise UserError(f"not a single frame of {path} could be decoded; it is broken.")
    if came < expected:
        warnings.warn(f"{path} is damaged: {expected - came} of {expected} frames could not be decoded", stacklevel=3)

"""Pictures and videos of strangers are decoded in processes of their own, which may crash, hang or be killed.

Each worker has a limit of address space and a time for each file; one that passes it is killed and another takes its place.
What comes back is pixels as the model takes them, of a video in a file, so that nothing here grows with its length.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import multiprocessing
import os
import resource
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessPool
from PIL import Image

from lmm_jax.config import ModelConfig
from lmm_jax.data.image import load_image, preprocess
from lmm_jax.data.video import stream_frames
from lmm_jax.errors import TryLaterError, UserError
from lmm_jax.serve.limits import Limits

log = logging.getLogger("uvicorn.error")
_START_SECONDS = 60.0
_TASKS = 500  # of a worker, before a fresh one takes its place: whatever a decoder leaks goes with it


@dataclasses.dataclass(frozen=True)
class Shape:
    """How the model takes pictures, see `data.image.preprocess`."""

    size: int
    aspect_ratio: str
    resolution_ratio: int

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """A model's."""
        return cls(config.vision.image_size, config.image_aspect_ratio, config.resolution_ratio)

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """(P,H,W,3) uint8."""
        return preprocess(picture, size=self.size, aspect_ratio=self.aspect_ratio, resolution_ratio=self.resolution_ratio)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A part of a video, see `inference.assistant.Video`."""

    fps: float = 1.0
    start: float | None = None
    end: float | None = None
    most: int | None = None


class Decoders:
    """The worker processes: some for pictures and some for videos, so that these do not hold up those.

    Attributes:
      held: bytes of decoded frames that are still in use; they lie on the disk.
    """

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        """Starts none yet: they begin with the first file that they are given."""
        self._shape, self._limits, self.held = Shape.of(config), limits, 0
        self._pools: dict[str, ProcessPool] = {}
        self._lock = threading.Lock()

    async def picture(self, source: Path) -> np.ndarray:
        """Pixels (P,H,W,3) uint8. Raises UserError for what is no picture, is too large or takes too long."""
        limits = self._limits
        return await self._run("picture", limits.image_seconds, _picture, source, self._shape, limits.image_pixels)

    async def video(self, source: Path, clip: Clip, frames: Path) -> list[np.ndarray]:
        """Frames, each (P,H,W,3) uint8, which lie in the file `frames`. Raises UserError as `picture` does."""
        most = min(clip.most or self._limits.frames, self._limits.frames)
        given = (source, dataclasses.replace(clip, most=most), frames, self._shape)
        shape = await self._run("video", self._limits.video_seconds, _video, *given)
        pixels = np.memmap(frames, np.uint8, "r", shape=shape)
        self._hold(pixels.nbytes)
        weakref.finalize(pixels, self._hold, -pixels.nbytes)
        return list(pixels)

    async def start(self) -> None:
        """Returns when a worker is ready."""
        await self._run("picture", _START_SECONDS, _ready)

    def close(self) -> None:
        """Ends all workers, whatever they are at."""
        for pool in self._pools.values():
            pool.stop()
            pool.join()

    def _hold(self, size: int) -> None:
        with self._lock:
            self.held += size

    async def _run(self, kind: str, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        try:
            try:
                return await asyncio.wrap_future(self._schedule(kind, seconds, function, args))
            except (BrokenProcessPool, RuntimeError):  # a worker died while it had nothing to do: its pool is lost
                self._pools.pop(kind).stop()
                return await asyncio.wrap_future(self._schedule(kind, seconds, function, args))
        except TimeoutError:
            raise UserError(f"the {kind} took longer than {seconds:g} seconds to decode: give a smaller one") from None
        except ProcessExpired as error:
            raise UserError(f"the {kind} cannot be read: its decoder crashed (status {error.exitcode})") from None
        except MemoryError:
            raise UserError(f"the {kind} takes too much memory to decode: give a smaller one") from None
        except OSError as error:
            log.error("a %s could not be decoded: %s", kind, error)
            raise TryLaterError(f"there is no room to decode the {kind}: try again later") from None

    def _schedule(self, kind: str, seconds: float, function: Callable[..., Any], args: Sequence[Any]) -> Future:
        if kind not in self._pools:
            self._pools[kind] = ProcessPool(
                max_workers=self._limits.decoders,
                max_tasks=_TASKS,
                initializer=_confine,
                initargs=(int(self._limits.decoder_mb * 1e6),),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pools[kind].schedule(function, args=args, timeout=seconds)


def _confine(address_space: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    warnings.simplefilter("ignore")


def _ready() -> None:
    """Does nothing: that it runs says that the worker has imported all it needs."""


def _picture(source: Path, shape: Shape, max_pixels: int) -> np.ndarray:
    try:
        return shape.pixels(load_image(source, upright=True, max_pixels=max_pixels))
    except UserError as error:
        raise _nameless(error, source, "the picture") from None


def _video(source: Path, clip: Clip, frames: Path, shape: Shape) -> tuple[int, ...]:
    """Writes the frames one behind the other; returns (F,P,H,W,3)."""
    count, one = 0, ()
    try:
        with (
            stream_frames(source, size=shape.size, **dataclasses.asdict(clip)) as stream,
            open(frames, "wb") as file,
        ):
            for frame in stream:
                pixels = shape.pixels(Image.fromarray(frame))
                file.write(pixels.data)
                count, one = count + 1, pixels.shape
    except UserError as error:
        raise _nameless(error, source, "the video") from None
    return (count, *one)


def _nameless(error: UserError, source: Path, name: str) -> UserError:
    """The same, without a path of the server's disk."""
    return UserError(str(error).replace(os.fspath(source), name))

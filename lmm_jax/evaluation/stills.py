"""Pictures of records for people to look at: their own, or a few frames of their video."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from lmm_jax.data.frames import FrameFolder, video_file
from lmm_jax.data.video import frame_indices, take_frames
from lmm_jax.errors import UserError
from lmm_jax.evaluation import registry
from lmm_jax.evaluation.benchmark import Record

FRAMES = 4  # of a video
_SIDE = 224  # of a frame, in pixels


class Pictures:
    """Gives the pictures of a record, as far as its benchmark's data is at hand."""

    def __init__(self, folders: Mapping[str, Path], root: Path) -> None:
        """Reads nothing yet.

        Args:
          folders: where the data of some benchmarks lies.
          root: the folder below which that of the others does.
        """
        self._folders, self._root = folders, root
        self._records = functools.cache(self._read)  # a benchmark's questions, once

    def __call__(self, name: str, key: int) -> list[bytes | Path]:
        """Of a record of a benchmark; nothing where its data is not there.

        Raises:
          UserError: its video cannot be read.
        """
        record = self._records(name).get(key)
        if record is None:
            return []
        if record.video:
            return stills(record.video)
        return [p if isinstance(p, bytes) else Path(p) for p in record.images]

    def _read(self, name: str) -> dict[int, Record]:
        benchmark = registry.benchmarks()[name]
        folder = self._folders.get(name, self._root / benchmark.folder)
        try:
            if not folder.is_dir():
                raise UserError(f"there is no {folder}")
            return {record.key: record for record in benchmark.records(folder)}
        except UserError as error:
            print(f"note: no pictures of {name}: {error}", file=sys.stderr)
            return {}


def stills(video: str) -> list[bytes]:
    """A few frames of a video, or of a folder of frames, as PNG.

    Raises:
      UserError: it cannot be read.
    """
    file = video_file(video)
    if os.path.isdir(file):
        folder = FrameFolder(file)
        frames = [folder[i] for i in frame_indices(len(folder), FRAMES)]
    else:
        frames = list(take_frames(file, size=_SIDE, frames=FRAMES))
    return [_png(Image.fromarray(frame)) for frame in frames]


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.thumbnail((2 * _SIDE, 2 * _SIDE))
    picture.save(file, "PNG")
    return file.getvalue()

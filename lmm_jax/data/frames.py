"""Where the frames of a video come from: a file that may be named without its suffix, or a folder of pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from lmm_jax import storage
from lmm_jax.data.image import load_image
from lmm_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".gif")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def video_file(path: str) -> str:
    """The file of a video that a record names: as it is named, or with a suffix where it has none.

    Video-ChatGPT's files name videos without a suffix, or with ``.pkl``, of the features that its authors computed.
    """
    stem, suffix = os.path.splitext(path)
    if suffix.lower() in VIDEO_SUFFIXES or storage.exists(path):
        return path
    stems = (path, stem) if suffix == ".pkl" else (path,)
    return next((s + end for s in stems for end in VIDEO_SUFFIXES if storage.exists(s + end)), path)


class FrameFolder:
    """A folder whose pictures, in the order of their names, are the frames of a video: all of them, whatever their number.

    As in the published code they are not squashed to a square before they are preprocessed (evaluation spec section 2).
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """Lists the pictures.

        Raises:
          UserError: there is none.
        """
        self._files = sorted(e.path for e in os.scandir(folder) if e.name.lower().endswith(PICTURE_SUFFIXES) and e.is_file())
        if not self._files:
            raise UserError(f"the folder {folder} holds no {', '.join(PICTURE_SUFFIXES)}: it is no video")

    def __len__(self) -> int:
        """Frames (F)."""
        return len(self._files)

    def __getitem__(self, number: int) -> np.ndarray:
        """One frame, uint8 (H, W, 3). Raises UserError where it cannot be read."""
        return np.asarray(load_image(self._files[number], upright=True))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each frame in turn."""
        return (self[number] for number in range(len(self)))

    def __enter__(self) -> FrameFolder:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

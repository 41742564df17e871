"""Files that clients upload, to be asked about as often as they like until their time is over."""

from __future__ import annotations

import dataclasses
import shutil
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from lmm_jax.serve import schema
from lmm_jax.serve.errors import ApiError
from lmm_jax.serve.limits import Limits


@dataclasses.dataclass
class Upload:
    """One file.

    Attributes:
      told: what its owner is told.
      folder: that holds it.
      decoded: what a part of it was decoded to, for the next question.
      uses: requests that read it now, until whose end it stays on the disk.
      is_deleted: nobody else may read it.
    """

    told: schema.File
    folder: Path
    decoded: dict[Any, Any] = dataclasses.field(default_factory=dict)
    uses: int = 0
    is_deleted: bool = False

    @property
    def path(self) -> Path:
        """Of what was uploaded."""
        return self.folder / "content"

    def __enter__(self) -> Upload:
        """It stays."""
        self.uses += 1
        return self

    def __exit__(self, *exc: object) -> None:
        """It may go."""
        self.uses -= 1
        self.sweep()

    def sweep(self) -> None:
        """Removes it from the disk where it is deleted and nobody reads it."""
        if self.is_deleted and not self.uses:
            shutil.rmtree(self.folder, ignore_errors=True)


class FileStore:
    """The uploads in a folder. Used by one thread."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """`folder` is there, and this store's own."""
        self._folder, self._limits = folder, limits
        self._files: dict[str, Upload] = {}
        self._pending = 0  # bytes of uploads that are not complete

    async def add(self, name: str, purpose: str, content: AsyncIterator[bytes]) -> schema.File:
        """Takes a file. Raises ApiError for one that is empty or too large, and where there are too many."""
        limits = self._limits
        if len(self._files) >= limits.files:
            raise ApiError(429, f"there are {limits.files} files already: delete some", code="too_many_files")
        now, file_id = int(time.time()), f"file-{uuid.uuid4().hex}"
        folder, size = self._folder / file_id, 0
        folder.mkdir()
        try:
            with open(folder / "content", "wb") as file:
                async for piece in content:
                    size, self._pending = size + len(piece), self._pending + len(piece)
                    self._check(size)
                    file.write(piece)
            if not size:
                raise ApiError(400, "the file is empty: expected a picture or a video", param="file")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self._pending -= size
        expires = now + int(limits.file_seconds)
        told = schema.File(id=file_id, bytes=size, created_at=now, expires_at=expires, filename=name, purpose=purpose)
        self._files[file_id] = Upload(told, folder)
        return told

    def _check(self, size: int) -> None:
        limits = self._limits
        if size > limits.file_mb * 1e6:
            raise ApiError(413, f"the file is larger than {limits.file_mb:g} MB", code="file_too_large", param="file")
        if self._pending + sum(u.told.bytes for u in self._files.values()) > limits.files_mb * 1e6:
            raise ApiError(
                429, f"all files together are larger than {limits.files_mb:g} MB: delete some", code="too_many_files"
            )

    def get(self, file_id: str) -> Upload:
        """An upload. Raises ApiError where there is none."""
        self.expire()
        if file_id not in self._files:
            raise ApiError(404, f"there is no file {file_id[:100]!r}: it was deleted or never uploaded", code="file_not_found")
        return self._files[file_id]

    def all(self) -> list[schema.File]:
        """The newest first."""
        self.expire()
        return [u.told for u in reversed(self._files.values())]

    def delete(self, file_id: str) -> None:
        """Forgets an upload; see `get`."""
        upload = self.get(file_id)
        del self._files[file_id]
        upload.is_deleted = True
        upload.sweep()

    def forget(self) -> bool:
        """Drops what the oldest decoded upload was decoded to; returns whether there was one."""
        oldest = next((u for u in self._files.values() if u.decoded), None)
        if oldest:
            oldest.decoded = {}
        return oldest is not None

    def expire(self) -> None:
        """Deletes those whose time is over."""
        for file_id in [i for i, u in self._files.items() if u.told.expires_at <= time.time()]:
            upload = self._files.pop(file_id)
            upload.is_deleted = True
            upload.sweep()

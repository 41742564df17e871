"""Messages of a request -> a conversation with its pictures and videos decoded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmm_jax.data.conversation import IMAGE, VIDEO, Message, with_placeholders
from lmm_jax.inference.assistant import Conversation
from lmm_jax.serve import schema
from lmm_jax.serve.decoding import Clip, Decoders
from lmm_jax.serve.errors import RETRY_SECONDS, ApiError
from lmm_jax.serve.fetching import fetch, is_public
from lmm_jax.serve.files import FileStore, Upload
from lmm_jax.serve.limits import Limits

Medium = np.ndarray | list[np.ndarray]
MediaPart = schema.ImagePart | schema.VideoUrlPart | schema.InputVideoPart

_ANY_RATE = 1000.0  # frames per second: all there are
_DATA_URL = re.compile(r"data:[\w.+-]*(?:/[\w.+-]*)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)


class MediaReader:
    """Reads the media of requests.

    Attributes:
      store: what was uploaded.
    """

    def __init__(
        self,
        decoders: Decoders,
        store: FileStore,
        folder: Path,
        limits: Limits,
        allows_remote: bool,
        allows_address: Callable[[str], bool] = is_public,
    ) -> None:
        """Reads into `folder`, which is there; `allows_address` is of servers that may be fetched from."""
        self.store, self._decoders, self._folder, self._limits = store, decoders, folder, limits
        self._allows_remote, self._allows_address = allows_remote, allows_address

    async def conversation(self, turns: Sequence[schema.Turn], videos_as: schema.VideoKwargs) -> Conversation:
        """What was said, with pixels; `videos_as` says which frames of videos, where their parts of a message do not.

        What lies on the disk meanwhile is removed before this returns.

        Raises:
          UserError: media that cannot be read or are not allowed, placeholders that do not match, turns out of order.
        """
        messages, parts = told(turns)
        videos = sum(not isinstance(p, schema.ImagePart) for p in parts)
        for count, most, kind in (
            (len(parts) - videos, self._limits.images, "pictures"),
            (videos, self._limits.videos, "videos"),
        ):
            if count > most:
                raise ApiError(400, f"the request has {count} {kind}, at most {most} are read", param="messages")
        if not parts:
            return Conversation(tuple(messages), ())
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            tasks = [asyncio.create_task(self._read(part, videos_as, folder / str(n))) for n, part in enumerate(parts)]
            try:
                media = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)
        return Conversation(tuple(messages), tuple(media))

    async def _read(self, part: MediaPart, videos_as: schema.VideoKwargs, at: Path) -> Medium:
        if isinstance(part, schema.ImagePart):
            source, clip = part.image_url, None
        else:
            source = part.video_url if isinstance(part, schema.VideoUrlPart) else part.input_video
            clip = _clip(source, videos_as)
        if source.file_id is not None or (source.url or "").startswith("file-"):
            with self.store.get(source.file_id or source.url) as upload:
                return await self._uploaded(upload, clip, at)
        data = getattr(source, "data", None)
        if data is None and not source.url.startswith("data:"):
            await self._fetch(source.url, at)
        else:
            await asyncio.to_thread(_write_base64, source.url if data is None else data, at, data is None)
        return await self.decode(at, clip, at)

    async def _uploaded(self, upload: Upload, clip: Clip | None, at: Path) -> Medium:
        if clip in upload.decoded:
            return upload.decoded[clip]
        medium = await self.decode(upload.path, clip, at)
        upload.decoded = {clip: medium}  # of one part only: different parts of one video must not fill the disk
        return medium

    async def decode(self, path: Path, clip: Clip | None, at: Path) -> Medium:
        """A picture, or a part of a video, whose frames lie beside `at` until who called removes them."""
        if clip is None:
            return await self._decoders.picture(path)
        while self._decoders.held > 1e6 * self._limits.decoded_mb:
            if not self.store.forget():
                raise ApiError(429, "too many videos are asked about at once: try again later", retry_after=RETRY_SECONDS)
        return await self._decoders.video(path, clip, at.with_suffix(".frames"))

    async def _fetch(self, url: str, at: Path) -> None:
        if not self._allows_remote:
            raise ApiError(
                400,
                "this server fetches nothing from other servers: give the file as a data URL (data:image/png;base64,…) "
                "or upload it to /v1/files and give its id",
                code="remote_urls_off",
            )
        limits = self._limits
        await fetch(url, at, max_bytes=int(limits.remote_mb * 1e6), seconds=limits.remote_seconds, allows=self._allows_address)


def _clip(source: schema.VideoUrl, common: schema.VideoKwargs) -> Clip:
    """Which frames are taken. A number of frames alone means that the rate does not matter."""
    most = source.frames or (common.num_frames if (common.num_frames or -1) > 0 else None)
    fps = source.fps or common.fps or (_ANY_RATE if most or common.num_frames else 1.0)
    return Clip(fps, source.start, source.end, most)


def told(turns: Sequence[schema.Turn]) -> tuple[list[Message], list[MediaPart]]:
    """Messages with a placeholder for each medium, user and assistant in turn, and the media in order.

    Turns of the same role in a row are one; what a system or developer says comes before what the user says next.
    """
    merged: list[tuple[str, list[schema.Part]]] = []
    for turn in turns:
        role = "assistant" if turn.role == "assistant" else "user"
        parts = turn.content or []
        parts = [schema.TextPart(type="text", text=parts)] if isinstance(parts, str) else parts
        if merged and merged[-1][0] == role:
            merged[-1][1].extend(parts)
        else:
            merged.append((role, list(parts)))
    if not merged or merged[-1][0] != "user":
        raise ApiError(400, "the messages end with an answer: the last one must be a user's", param="messages")
    messages, media = [], []
    for role, parts in merged:
        found = [p for p in parts if not isinstance(p, schema.TextPart)]
        if role == "assistant":
            if found:
                raise ApiError(400, "an assistant's message holds a picture or a video: expected text", param="messages")
            messages.append(Message("assistant", "\n".join(p.text for p in parts)))
        else:
            messages.append(Message("user", _spelt(parts)))
        media += found
    return messages, media


def _spelt(parts: Sequence[schema.Part]) -> str:
    """A user's turn. Media that come before or after all its words are put in front, those between stay where they are."""
    is_text = [isinstance(p, schema.TextPart) for p in parts]
    words = "\n".join(p.text for p in parts if isinstance(p, schema.TextPart))
    if True in is_text:
        first, last = is_text.index(True), len(is_text) - is_text[::-1].index(True)
        if not all(is_text[first:last]) and IMAGE not in words and VIDEO not in words:
            return "\n".join(p.text if isinstance(p, schema.TextPart) else IMAGE for p in parts)
    return with_placeholders(words, is_text.count(False))


def _write_base64(text: str, into: Path, is_url: bool) -> None:
    start = 0
    if is_url:
        found = _DATA_URL.match(text)
        if not found:
            raise ApiError(400, f"a data URL begins {text[:40]!r}: expected data:image/png;base64,… or the like")
        start = found.end()
    try:
        content = base64.b64decode("".join(text[start:].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"a picture or video is not in base64 ({error})") from None
    if not content:
        raise ApiError(400, "a picture or video is empty: 0 bytes")
    into.write_bytes(content)

"""How much a client may ask for. Every limit is an option of ``lmm serve``, and passing one is answered with a 4xx."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from lmm_jax.errors import UserError


def _limit(default: float, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server; 0 is never "none"."""

    rows: int = _limit(32, "answers generated at once")
    queue: int = _limit(64, "requests that wait beyond those; more get 429")
    deadline: float = _limit(300.0, "seconds for one request, from its arrival to its last token")
    prompt_tokens: int = _limit(32768, "positions of one prompt, pictures included; never more than the model's context")
    new_tokens: int = _limit(4096, "longest answer, in tokens")
    choices: int = _limit(8, "answers to one request (n)")
    images: int = _limit(64, "pictures of one request")
    videos: int = _limit(4, "videos of one request")
    image_pixels: int = _limit(50_000_000, "pixels of one picture")
    frames: int = _limit(3600, "frames taken of one video; of longer ones as many, spread over the whole")
    body_mb: float = _limit(64.0, "one request, MB")
    bodies_mb: float = _limit(1024.0, "all requests that are answered or wait, MB")
    file_mb: float = _limit(512.0, "one uploaded file, MB")
    files_mb: float = _limit(4096.0, "all uploaded files, MB")
    files: int = _limit(1000, "uploaded files")
    file_seconds: float = _limit(3600.0, "seconds that an uploaded file is kept")
    head_seconds: float = _limit(10.0, "seconds for a client to send a request's headers")
    body_seconds: float = _limit(120.0, "seconds for a client to send a request")
    connections: int = _limit(1000, "connections at once")
    decoders: int = _limit(2, "processes that decode pictures, and as many that decode videos")
    decoded_mb: float = _limit(4096.0, "frames of videos that are decoded and in use, MB; on the disk")
    image_seconds: float = _limit(20.0, "seconds to decode one picture")
    video_seconds: float = _limit(240.0, "seconds to decode one video")
    decoder_mb: float = _limit(6144.0, "address space of a decoding process, MB")
    remote_mb: float = _limit(64.0, "one picture or video fetched from another server, MB")
    remote_seconds: float = _limit(20.0, "seconds to fetch it")

    def __post_init__(self) -> None:
        """Raises UserError for a limit that is not positive."""
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise UserError(f"--max-{field.name.replace('_', '-')} is {getattr(self, field.name)}: it must be more than 0")


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option for each limit."""
    group = parser.add_argument_group("limits")
    for field in dataclasses.fields(Limits):
        kind = type(field.default)
        group.add_argument(
            f"--max-{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            metavar="N",
            help=f"{field.metadata['help']} ({field.default:g})"
            if kind is float
            else f"{field.metadata['help']} (%(default)s)",
        )


def from_options(args: argparse.Namespace) -> Limits:
    """What was asked for. Raises UserError for a limit that is not positive."""
    return Limits(**{f.name: getattr(args, f"max_{f.name}") for f in dataclasses.fields(Limits)})

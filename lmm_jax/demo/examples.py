"""A picture and a clip of the small visual world to try things with."""

from __future__ import annotations

import dataclasses

from PIL import Image

from lmm_jax.demo.clips import Clip, Event, encode, frames
from lmm_jax.demo.world import COLOURS, SIZES, Thing, draw

_GROUND = (250, 244, 228)


def picture() -> Image.Image:
    """A red circle, a blue square and a green triangle."""
    circle, square = _thing("small", "red", "circle", 92, 26), _thing("large", "blue", "square", 88, 84)
    return draw(_GROUND, [circle, square, _thing("large", "green", "triangle", 34, 90)])


def clip() -> bytes:
    """An MP4: a circle moves to the right, then a square turns green."""
    circle, square = _thing("large", "red", "circle", 30, 34), _thing("large", "blue", "square", 84, 92)
    moves = Event("move", 0, 1.0, 2.25, "right", dataclasses.replace(circle, x=circle.x + 52))
    turns = Event("change", 1, 4.5, 5.75, after=dataclasses.replace(square, colour="green", rgb=COLOURS["green"]))
    return encode(frames(Clip(_GROUND, (circle, square), (moves, turns))))


def _thing(size: str, colour: str, shape: str, x: float, y: float) -> Thing:
    """Pixels from the left and from the top."""
    return Thing(shape, colour, size, x, y, SIZES[size], COLOURS[colour])

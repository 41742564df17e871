"""Draws the example picture and clip beside it: ``python examples/draw.py``."""

import dataclasses
from pathlib import Path

from lmm_jax.demo.clips import Clip, Event, encode, frames
from lmm_jax.demo.world import COLOURS, SIZES, Thing, draw

FOLDER = Path(__file__).parent
GROUND = (250, 244, 228)


def thing(size: str, colour: str, shape: str, x: float, y: float) -> Thing:
    """A thing of the small visual world; pixels from the left and from the top."""
    return Thing(shape, colour, size, x, y, SIZES[size], COLOURS[colour])


def main() -> None:
    """Writes shapes.png, and moving.mp4: the circle moves to the right, then the square turns green."""
    circle, square = thing("small", "red", "circle", 92, 26), thing("large", "blue", "square", 88, 84)
    triangle = thing("large", "green", "triangle", 34, 90)
    draw(GROUND, [circle, square, triangle]).save(FOLDER / "shapes.png", optimize=True)
    circle, square = thing("large", "red", "circle", 30, 34), thing("large", "blue", "square", 84, 92)
    moves = Event("move", 0, 1.0, 2.25, "right", dataclasses.replace(circle, x=circle.x + 52))
    turns = Event("change", 1, 4.5, 5.75, after=dataclasses.replace(square, colour="green", rgb=COLOURS["green"]))
    (FOLDER / "moving.mp4").write_bytes(encode(frames(Clip(GROUND, (circle, square), (moves, turns)))))


if __name__ == "__main__":
    main()

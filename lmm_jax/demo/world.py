"""Scenes of the small visual world: what is in them, where it lies, and how it is drawn.

Everything follows from a numpy Generator. Lengths are in pixels of the picture, x to the right and y downwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128  # height and width of pictures and clips
MARGIN = 4.0  # least distance between two things, and between a thing and the border
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (217, 38, 38),
    "green": (45, 155, 65),
    "blue": (40, 85, 215),
    "yellow": (240, 216, 22),
    "purple": (140, 50, 175),
    "orange": (246, 130, 20),
}
SIZES = {"small": 10.0, "large": 17.5}  # radius of a circle; the other shapes look as big
MOST_OBJECTS = 5

_MOST_LARGE = 4  # five large things hardly fit
_BACKGROUNDS = ((250, 250, 250), (250, 244, 228), (228, 238, 250), (230, 246, 230), (250, 232, 238), (226, 226, 230))
_RADIUS_JITTER, _COLOUR_JITTER, _BACKGROUND_JITTER = 0.8, 10, 4
_COPIED = 0.35  # how often a thing takes its colour, or its shape, from one before, so that there is something to count
_PLACINGS, _TRIES = 40, 40  # trials: of a scene before other things are taken, of a place before all are moved
_OVERSAMPLING = 4
_STAR_WAIST = 0.48  # radius of the inner corners of a star, as a part of the outer

# corners of the shapes for a radius of 1, around a middle that looks like one
_SQUARE = 0.89
_CORNERS = {
    "square": [(x * _SQUARE, y * _SQUARE) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))],
    "triangle": [(1.43 * math.sin(a), 0.1 - 1.43 * math.cos(a)) for a in (0, math.tau / 3, 2 * math.tau / 3)],
    "star": [
        (r * math.sin(k * math.tau / 10), 0.05 - r * math.cos(k * math.tau / 10))
        for k in range(10)
        for r in [1.4 if k % 2 == 0 else 1.4 * _STAR_WAIST]
    ],
}
_EXTENT = {"circle": 1.0} | {shape: max(math.hypot(*c) for c in corners) for shape, corners in _CORNERS.items()}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str  # one of SHAPES
    colour: str  # one of COLOURS
    size: str  # one of SIZES
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def extent(self) -> float:
        """Radius of the circle around (x, y) that holds all of it."""
        return self.radius * _EXTENT[self.shape]

    @property
    def name(self) -> str:
        """Colour and shape, as in answers: "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture: 1 to `MOST_OBJECTS` things that do not touch, on a plain light ground."""

    background: tuple[int, int, int]
    things: tuple[Thing, ...]


def choose(rng: np.random.Generator, options: Iterable):
    """One of the options, all being equally likely."""
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def make_scene(rng: np.random.Generator, objects: tuple[int, int] = (1, MOST_OBJECTS)) -> Scene:
    """A scene with at least `objects[0]` and at most `objects[1]` things, every number being equally likely."""
    number = int(rng.integers(objects[0], objects[1] + 1))
    while True:
        things = _kinds(rng, number)
        for _ in range(_PLACINGS):
            places = place([[(0.0, 0.0)]] * number, [t.extent for t in things], rng)
            if places is None:
                continue
            placed = (dataclasses.replace(t, x=x, y=y) for t, (x, y) in zip(things, places))
            return Scene(make_background(rng), tuple(placed))


def make_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light RGB colour."""
    return _jittered(rng, choose(rng, _BACKGROUNDS), _BACKGROUND_JITTER)


def make_thing(rng: np.random.Generator, shape: str, colour: str, size: str) -> Thing:
    """A thing at (0, 0)."""
    radius = SIZES[size] + rng.uniform(-_RADIUS_JITTER, _RADIUS_JITTER)
    return Thing(shape, colour, size, 0.0, 0.0, radius, paint(rng, colour))


def paint(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    """An RGB colour of that name."""
    return _jittered(rng, COLOURS[colour], _COLOUR_JITTER)


def place(paths: list[list[tuple[float, float]]], extents: list[float], rng: np.random.Generator) -> list | None:
    """Where things can stand so that all stay in the picture and none come nearer to each other than `MARGIN`.

    Args:
      paths: for each thing the points, relative to its place, that it passes.
      extents: for each thing the radius that it takes up.

    Returns:
      (x, y) for each thing, or None when no room was found.
    """
    places, taken = [], []
    for path, extent in zip(paths, extents):
        low = [extent + MARGIN - min(p[axis] for p in path) for axis in (0, 1)]
        high = [SIDE - extent - MARGIN - max(p[axis] for p in path) for axis in (0, 1)]
        if any(a > b for a, b in zip(low, high)):
            return None
        for x, y in rng.uniform(low, high, (_TRIES, 2)).tolist():
            points = [(x + dx, y + dy) for dx, dy in path]
            if all(math.dist(p, q) >= extent + other + MARGIN for p in points for *q, other in taken):
                places.append((x, y))
                taken += [(*p, extent) for p in points]
                break
        else:
            return None
    return places


def draw(background: tuple[int, int, int], things: Iterable[Thing]) -> Image.Image:
    """The picture, RGB of `SIDE` x `SIDE` pixels with smooth edges."""
    image = Image.new("RGB", (SIDE, SIDE), background)
    for thing in things:
        left, top = (math.floor(c - thing.extent) - 1 for c in (thing.x, thing.y))
        side = 2 * math.ceil(thing.extent) + 4
        mask = Image.new("L", (side * _OVERSAMPLING,) * 2)
        x, y, radius = (_OVERSAMPLING * v for v in (thing.x - left, thing.y - top, thing.radius))
        pen = ImageDraw.Draw(mask)
        if thing.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        else:
            pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _CORNERS[thing.shape]], fill=255)
        image.paste(thing.rgb, (left, top), mask.reduce(_OVERSAMPLING))
    return image


def _kinds(rng: np.random.Generator, number: int) -> list[Thing]:
    things: list[Thing] = []
    is_large = rng.random(number) < 0.5
    is_large[_MOST_LARGE:] &= not is_large[:_MOST_LARGE].all()
    for size in np.where(np.sort(is_large)[::-1], "large", "small").tolist():
        copies = rng.random(2) < _COPIED
        shape = choose(rng, [t.shape for t in things] if things and copies[0] else SHAPES)
        colour = choose(rng, [t.colour for t in things] if things and copies[1] else COLOURS)
        things.append(make_thing(rng, shape, colour, size))
    return things


def _jittered(rng: np.random.Generator, rgb: tuple[int, int, int], most: int) -> tuple[int, int, int]:
    return tuple(np.clip(np.add(rgb, rng.integers(-most, most + 1, 3)), 0, 255).tolist())

"""Descriptions of pictures and clips. What is asked for decides which kind of description is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from lmm_jax.demo import options
from lmm_jax.demo.asking import article, lines
from lmm_jax.demo.clips import Clip
from lmm_jax.demo.options import SceneView
from lmm_jax.demo.world import COLOURS, SHAPES, SIDE, Scene, Thing, choose

_MIDDLE = 12.0  # what is less than this off the centre line is neither left nor right, or neither top nor bottom

_FULL = """
    Describe the picture.
    Describe the image.
    What does the picture show?
    What is in the image?
"""
_PLACES = """
    Where are the objects?
    Tell me where the objects are.
"""
_LIST = """
    List the objects.
    Which objects can you see?
"""
_TALLY = """
    Count each shape.
    How many objects of each shape are there?
"""
_COLOUR_TALLY = """
    Count the objects of each colour.
    How many objects of each color are there?
"""
_FACT = """
    Tell me one thing about the picture.
    Say something about the image.
"""
_EVENTS = """
    Describe the clip.
    Describe the video.
    What happens in the clip?
    Tell me what happens in the video.
"""
_CAST = """
    List the objects in the clip.
    Which objects can you see in the video?
"""


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A request to describe a picture, and what it asks for: everything, or places, a list, numbers or one relation."""
    kinds = ((_FULL, _full), (_PLACES, _places), (_LIST, _list), (_TALLY, _tally), (_COLOUR_TALLY, _colour_tally))
    fact = options.is_on_side(SceneView(scene))["yes"]
    number = int(rng.choice(6, p=(0.6, 0.08, 0.08, 0.08, 0.08, 0.08)))
    if number == 5 and fact:
        return choose(rng, lines(_FACT)), _fact(SceneView(scene), choose(rng, fact), rng)
    requests, text = kinds[number % 5]  # everything, where no relation is clear
    return choose(rng, lines(requests)), text(_in_reading_order(scene))


def describe_clip(clip: Clip, rng: np.random.Generator) -> tuple[str, str]:
    """A request to describe a clip, and what it asks for: the events, or (less often) the things in it."""
    if rng.random() < 0.2:
        return choose(rng, lines(_CAST)), _sentence(article(t.name) for t in clip.things)
    acting = {e.thing for e in clip.events}
    still = [article(t.name) for i, t in enumerate(clip.things) if i not in acting]
    happening = ", then ".join(f"{article(clip.things[e.thing].name)} {e.verb}" for e in clip.events) + "."
    return choose(
        rng, lines(_EVENTS)
    ), f"{happening} {' and '.join(still)} {'stay' if len(still) > 1 else 'stays'}." if still else happening


def _in_reading_order(scene: Scene) -> list[Thing]:
    return sorted(scene.things, key=lambda t: (_band(t.y), t.x))


def _band(position: float) -> int:
    """-1, 0 or 1: before, around or after the centre line."""
    off = position - SIDE / 2
    return 0 if abs(off) < _MIDDLE else int(np.sign(off))


def _place(thing: Thing) -> str:
    row, column = ("", "bottom", "top")[_band(thing.y)], ("", "right", "left")[_band(thing.x)]
    return " ".join(filter(None, (row, column))) or "centre"


def _sentence(parts: Iterable[str]) -> str:
    return ", ".join(parts) + "."


def _full(things: list[Thing]) -> str:
    return _sentence(f"{article(t.size)} {t.name} at the {_place(t)}" for t in things)


def _places(things: list[Thing]) -> str:
    return _sentence(f"{t.name}: {_place(t)}" for t in things)


def _list(things: list[Thing]) -> str:
    return f"{_number(len(things), 'object')}: {_sentence(article(t.name) for t in things)}"


def _tally(things: list[Thing]) -> str:
    numbers = Counter(t.shape for t in things)
    return _sentence(_number(numbers[s], s) for s in SHAPES if s in numbers)


def _colour_tally(things: list[Thing]) -> str:
    numbers = Counter(t.colour for t in things)
    return _sentence(_number(numbers[c], f"{c} object") for c in COLOURS if c in numbers)


def _fact(view: SceneView, slots: dict, rng: np.random.Generator) -> str:
    a, b = (choose(rng, view.phrases(slots[k])) for k in "ab")
    return f"the {a} is {slots['side']} the {b}."


def _number(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

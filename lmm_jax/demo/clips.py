"""Clips of the small visual world: a scene in which one thing after the other moves, changes colour, comes or goes.

The world looks the same when a clip runs backwards: the kinds of event and their times are as likely then. So frames in
disorder do not tell what came first, as long as a question only names events that look the same both ways (`REVERSIBLE`).
Times are in seconds from the start.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lmm_jax.demo.world import COLOURS, SHAPES, SIZES, Thing, choose, draw, make_background, make_thing, paint, place

SECONDS, RATE = 8, 4  # length, and frames per second
MOST_OBJECTS = 4
KINDS = ("move", "change", "visit", "appear", "disappear")
REVERSIBLE = ("move", "change", "visit")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_KIND_RATES = (0.4, 0.2, 0.2, 0.1, 0.1)
_ALIKE = 0.5  # how often all events of a clip are of one kind, so that it can be asked which of them came first
_OBJECT_RATES = (0.1, 0.3, 0.3, 0.3)
# One frame a second is looked at, the first at 0.5 s, the last at 7.25 s, and none more than a second after another.
_FIRST, _LAST = 0.6, 7.1
_LASTING, _GAP = 1.25, 1.0  # so at least one look falls within every event and one between any two
_WAYS = (34.0, 56.0)  # pixels moved
_STEPS = 8  # points of a way that are kept free
_PLACINGS = 20


@dataclasses.dataclass(frozen=True)
class Event:
    """What happens to one thing: it moves, changes colour, visits (appears and disappears again), appears or disappears."""

    kind: str  # one of KINDS
    thing: int  # which of the clip's things
    start: float
    end: float
    direction: str = ""  # of a move
    after: Thing | None = None  # what the thing is after a move or change

    @property
    def verb(self) -> str:
        """What the thing does: "moves left", "turns blue", "appears"."""
        if self.kind == "move":
            return f"moves {self.direction}"
        if self.kind == "change":
            return f"turns {self.after.colour}"
        return {"visit": "appears and disappears", "appear": "appears", "disappear": "disappears"}[self.kind]


@dataclasses.dataclass(frozen=True)
class Clip:
    """1 to `MOST_OBJECTS` things as they are at first (or come in), and 1 to 3 events, each of another thing, in order.

    No two things ever have the same colour and shape; one that changes colour has a shape of its own.
    """

    background: tuple[int, int, int]
    things: tuple[Thing, ...]
    events: tuple[Event, ...]

    def at(self, time: float) -> list[Thing | None]:
        """The things as they are at that time; None where one is not there."""
        states: list[Thing | None] = list(self.things)
        for event in self.events:
            states[event.thing] = _state(event, self.things[event.thing], (time - event.start) / (event.end - event.start))
        return states


def _state(event: Event, thing: Thing, done: float) -> Thing | None:
    if event.kind == "move":
        part = min(max(done, 0.0), 1.0)
        x, y = (a + part * (b - a) for a, b in ((thing.x, event.after.x), (thing.y, event.after.y)))
        return dataclasses.replace(thing, x=x, y=y)
    if event.kind == "change":
        return event.after if done >= 0.5 else thing
    is_there = {"visit": 0 <= done < 1, "appear": done >= 0.5, "disappear": done < 0.5}[event.kind]
    return thing if is_there else None


def make_clip(rng: np.random.Generator, objects: tuple[int, int] = (1, MOST_OBJECTS)) -> Clip:
    """A clip with at least `objects[0]` and at most `objects[1]` things."""
    rates = np.array([r if objects[0] <= n <= objects[1] else 0.0 for n, r in enumerate(_OBJECT_RATES, 1)])
    number = 1 + int(rng.choice(MOST_OBJECTS, p=rates / rates.sum()))
    while True:
        things, events = _cast(rng, number)
        ways = [_way(rng, e.direction) for e in events]
        paths = [[(0.0, 0.0)]] * number
        for event, way in zip(events, ways):
            paths[event.thing] = [(way[0] * s / _STEPS, way[1] * s / _STEPS) for s in range(_STEPS + 1)]
        for _ in range(_PLACINGS):
            places = place(paths, [t.extent for t in things], rng)
            if places is None:
                continue
            placed = [dataclasses.replace(t, x=x, y=y) for t, (x, y) in zip(things, places)]
            events = [_placed(e, placed[e.thing], way) for e, way in zip(events, ways)]
            return Clip(make_background(rng), tuple(placed), tuple(events))


def _cast(rng: np.random.Generator, number: int) -> tuple[list[Thing], list[Event]]:
    """Things that can be told apart, not yet placed, and what happens to them."""
    count = int(rng.integers(1, min(3, number) + 1))
    kinds = rng.choice(KINDS, count, p=_KIND_RATES)
    if rng.random() < _ALIKE:
        kinds[:] = choose(rng, REVERSIBLE)
    while True:
        own_shapes = rng.permutation(SHAPES)[:number].tolist()
        shapes = own_shapes if rng.random() < 0.6 else [choose(rng, SHAPES) for _ in range(number)]
        things = [make_thing(rng, shape, choose(rng, COLOURS), choose(rng, SIZES)) for shape in shapes]
        changing = [shapes[i] for i, kind in enumerate(kinds) if kind == "change"]
        if len({t.name for t in things}) == number and all(shapes.count(shape) == 1 for shape in changing):
            break
    order, starts = rng.permutation(count).tolist(), _starts(rng, count)
    events = []
    for i, start in zip(order, starts):
        kind = str(kinds[i])
        after, direction = None, choose(rng, DIRECTIONS) if kind == "move" else ""
        if kind == "change":
            colour = choose(rng, [c for c in COLOURS if c != things[i].colour])
            after = dataclasses.replace(things[i], colour=colour, rgb=paint(rng, colour))
        events.append(Event(kind, i, start, start + _LASTING, direction, after))
    return things, events


def _starts(rng: np.random.Generator, count: int) -> list[float]:
    spare = _LAST - _FIRST - count * _LASTING - (count - 1) * _GAP
    return [_FIRST + i * (_LASTING + _GAP) + extra for i, extra in enumerate(np.sort(rng.uniform(0, spare, count)).tolist())]


def _way(rng: np.random.Generator, direction: str) -> tuple[float, float]:
    length = rng.uniform(*_WAYS)
    dx, dy = DIRECTIONS.get(direction, (0, 0))
    return length * dx, length * dy


def _placed(event: Event, thing: Thing, way: tuple[float, float]) -> Event:
    if event.kind not in ("move", "change"):
        return event
    moved = dataclasses.replace(event.after or thing, x=thing.x + way[0], y=thing.y + way[1])
    return dataclasses.replace(event, after=moved)


def frames(clip: Clip) -> list[Image.Image]:
    """All frames of a clip, `SECONDS` * `RATE` of them."""
    times = [i / RATE for i in range(SECONDS * RATE)]
    return [draw(clip.background, [t for t in clip.at(time) if t]) for time in times]


def encode(images: Sequence[Image.Image]) -> bytes:
    """The frames as an MP4 file: H.264 where there is an encoder for it, else MPEG-4."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": "16", "preset": "veryfast"} if codec == "libx264" else {"qscale": "2"}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        (stream.width, stream.height), stream.pix_fmt = images[0].size, "yuv420p"
        stream.codec_context.thread_count = 1  # with several the bytes need not be the same each time
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    return file.getvalue()

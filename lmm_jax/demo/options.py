"""What can be asked about a picture: how its things are referred to, and every question with its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from lmm_jax.demo.asking import ALL_KINDS, YES_NO, Kind, Options, Slots, article, grouped, kind_name, kinds_of, told
from lmm_jax.demo.world import COLOURS, SHAPES, SIDE, Scene, Thing

REGIONS = ("top left", "top right", "bottom left", "bottom right")

_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_BESIDE = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "above"),
    "below": ("below", "under"),
}
_EXTREMES = {"left": "furthest to the left", "right": "furthest to the right", "above": "highest", "below": "lowest"}
_CLEAR = 16.0  # pixels by which one thing must lie beside another to be called so
_OFF_MIDDLE = 16.0  # pixels from the centre line within which a thing is in neither half
_LEAD = 12.0  # pixels by which the outermost thing must be further out than the next
_DOMINANT = 1.7  # ratio of the distances along both axes from which on one of them names the side


class SceneView:
    """A scene with the ways to refer to its things; see `asking.View`."""

    def __init__(self, scene: Scene) -> None:
        """Counts the things of each kind."""
        self.things = scene.things
        self.numbers = Counter(kind for thing in self.things for kind in kinds_of(thing))

    def phrases(self, thing: Thing, hidden: str = "") -> list[str]:
        """See `asking.View`. All three attributes are told only where two do not suffice."""
        kinds = [k for k in kinds_of(thing) if self.numbers[k] == 1 and hidden not in told(k)]
        short = [k for k in kinds if len(told(k)) < 3]
        return [kind_name(k) for k in short or kinds]

    def named(self, hidden: str = "") -> list[Thing]:
        """The things that can be referred to."""
        return [t for t in self.things if self.phrases(t, hidden)]

    def pairs(self, hidden: str = "") -> list[tuple[Thing, Thing]]:
        """All ordered pairs of things that can be referred to."""
        named = self.named(hidden)
        return [(a, b) for a in named for b in named if a is not b]

    def only_beside(self, side: str, thing: Thing) -> Thing | None:
        """The one thing that clearly lies on that side of another, if no other does, not even barely."""
        found = [t for t in self.things if t is not thing and _offset(t, thing, side)[0] > 0]
        return found[0] if len(found) == 1 and is_beside(found[0], thing, side) else None

    def only_in(self, region: str) -> Thing | None:
        """The one thing in a corner of the picture, if no other reaches into it."""
        found = [t for t in self.things if region in _touched(t)]
        return found[0] if len(found) == 1 and region_of(found[0]) == region else None


def _offset(a: Thing, b: Thing, side: str) -> tuple[float, float]:
    """How far a lies on that side of b, and how far across."""
    (dx, dy), x, y = _DIRECTIONS[side], a.x - b.x, a.y - b.y
    return dx * x + dy * y, abs(dy * x) + abs(dx * y)


def is_beside(a: Thing, b: Thing, side: str) -> bool:
    """Whether a clearly lies on that side of b."""
    along, across = _offset(a, b, side)
    return along >= _CLEAR and along >= across / 2


def region_of(thing: Thing) -> str | None:
    """The corner in which a thing clearly lies."""
    x, y = thing.x - SIDE / 2, thing.y - SIDE / 2
    return _region(x, y) if min(abs(x), abs(y)) >= _OFF_MIDDLE else None


def _region(x: float, y: float) -> str:
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def _touched(thing: Thing) -> set[str]:
    """The corners that any part of a thing may reach into."""
    x, y, e = thing.x - SIDE / 2, thing.y - SIDE / 2, thing.extent
    return {_region(x + dx, y + dy) for dx in (-e, e) for dy in (-e, e)}


# ---- options: answer -> slots


def attribute(name: str) -> Callable[[SceneView], Options]:
    """What is the size, the colour or the shape of a thing."""
    return lambda view: grouped((getattr(t, name), {"a": t}) for t in view.named(name))


def attribute_check(name: str, values: Iterable[str]) -> Callable[[SceneView], Options]:
    """Whether a thing has this value of an attribute. Wrong values are those of other things, where these differ."""

    def options(view: SceneView) -> Options:
        present = {getattr(t, name) for t in view.things}
        tried = present if len(present) > 1 else values
        pairs = [(t, v) for t in view.named(name) for v in sorted(tried)]
        true = [{"a": t, "value": getattr(t, name)} for t in view.named(name)]
        return {"yes": true, "no": [{"a": t, "value": v} for t, v in pairs if v != getattr(t, name)]}

    return options


def beside(attribute: str) -> Callable[[SceneView], Options]:
    """What (by that attribute) lies beside a thing."""

    def options(view: SceneView) -> Options:
        found = [(view.only_beside(side, a), side, a) for a in view.named() for side in _BESIDE]
        return grouped((getattr(t, attribute), {"side": w, "a": a}) for t, side, a in found if t for w in _BESIDE[side])

    return options


def within(attribute: str) -> Callable[[SceneView], Options]:
    """What (by that attribute) lies in a corner."""

    def options(view: SceneView) -> Options:
        found = [(view.only_in(region), region) for region in REGIONS]
        return grouped((getattr(t, attribute), {"region": region}) for t, region in found if t)

    return options


def existence(*attributes: str) -> Callable[[SceneView], Options]:
    """Whether there is a thing of a kind that is told by these attributes. Absent kinds are as near as possible to others."""

    def options(view: SceneView) -> Options:
        there = {value for kind in view.numbers for value in kind if value}
        absent = [k for k in ALL_KINDS if told(k) == attributes and k not in view.numbers]
        nearest = max((sum(v in there for v in k) for k in absent), default=0)
        return {
            "yes": [_kind(k) for k in view.numbers if told(k) == attributes],
            "no": [_kind(k) for k in absent if sum(v in there for v in k) == nearest],  # a red star where other things are red
        }

    return options


def _kind(kind: Kind) -> Slots:
    return {"kind": article(kind_name(kind)), "kinds": kind_name(kind) + "s"}


def count(view: SceneView) -> Options:
    """How many things there are of a kind."""
    there = {value for kind in view.numbers for value in kind if value}
    kinds = [k for k in ALL_KINDS if 1 <= len(told(k)) <= 2]
    near = [k for k in kinds if k in view.numbers or len(told(k)) == 1 or there.issuperset(filter(None, k))]
    return grouped((str(view.numbers[k]), _kind(k)) for k in near)


def count_all(view: SceneView) -> Options:
    """How many things there are."""
    return {str(len(view.things)): [{}]}


def corner(view: SceneView) -> Options:
    """In which corner a thing lies."""
    return grouped((region, {"a": t}) for t in view.named() if (region := region_of(t)))


def is_in(view: SceneView) -> Options:
    """Whether a thing lies in a corner."""
    found = [(t, region_of(t), region) for t in view.named() if region_of(t) for region in REGIONS]
    return grouped((YES_NO[is_in != asked], {"a": t, "region": asked}) for t, is_in, asked in found)


def which_half(axis: str, low: str, high: str) -> Callable[[SceneView], Options]:
    """In which half a thing lies."""

    def options(view: SceneView) -> Options:
        off = [(t, getattr(t, axis) - SIDE / 2) for t in view.named()]
        return grouped((low if d < 0 else high, {"a": t}) for t, d in off if abs(d) >= _OFF_MIDDLE)

    return options


def outermost(view: SceneView) -> Options:
    """Which thing is the outermost on a side."""
    found = []
    for side, words in _EXTREMES.items():
        ahead = sorted(view.things, key=lambda t: -_offset(t, view.things[0], side)[0])
        if len(ahead) > 1 and _offset(*ahead[:2], side)[0] >= _LEAD:
            found.append((ahead[0].name, {"extreme": words}))
    return grouped(found)


def which_side(view: SceneView) -> Options:
    """On which side of one thing, out of four, another lies."""
    found = [(a, b, side, *_offset(a, b, side)) for a, b in view.pairs() for side in _BESIDE]
    clear = [(a, b, side) for a, b, side, along, across in found if along >= max(_CLEAR, _DOMINANT * across)]
    return grouped((side, {"a": a, "b": b}) for a, b, side in clear)


def either_side(*sides: str) -> Callable[[SceneView], Options]:
    """On which of two opposite sides of one thing another lies."""
    return lambda view: grouped((s, {"a": a, "b": b}) for a, b in view.pairs() for s in sides if is_beside(a, b, s))


def is_on_side(view: SceneView) -> Options:
    """Whether one thing lies on a side of another; where not, it lies on the opposite side."""
    found = [(a, b, side) for a, b in view.pairs() for side in _BESIDE if is_beside(a, b, side)]
    return {
        "yes": [{"a": a, "b": b, "side": word} for a, b, side in found for word in _BESIDE[side]],
        "no": [{"a": a, "b": b, "side": word} for a, b, side in found for word in _BESIDE[_OPPOSITE[side]]],
    }


def unequal(larger: str, *answers: str) -> Callable[[SceneView], Options]:
    """Pairs of a large and a small thing; the first answer where `larger` is asked of the first of the pair."""
    return lambda view: grouped(
        (answers[a.size != larger], {"a": a, "b": b}) for a, b in view.pairs("size") if a.size != b.size
    )


def same(name: str) -> Callable[[SceneView], Options]:
    """Whether two things have the same value of an attribute."""
    return lambda view: grouped((YES_NO[getattr(a, name) != getattr(b, name)], {"a": a, "b": b}) for a, b in view.pairs(name))


def _tallies(view: SceneView) -> list[tuple[int, Slots]]:
    """By how many things of one shape (or colour) outnumber those of another; both are there wherever possible."""
    found = []
    for values in (COLOURS, SHAPES):
        kinds = [k for k in ALL_KINDS if len(told(k)) == 1 and (k[1] or k[2]) in values]
        present = [k for k in kinds if k in view.numbers]
        for k, other in ((k, other) for k in kinds for other in kinds if k != other):
            if (k in present) + (other in present) >= min(2, len(present)):
                names = {"k": kind_name(k) + "s", "l": kind_name(other) + "s"}
                found.append((view.numbers[k] - view.numbers[other], names))
    return found


def are_more(view: SceneView) -> Options:
    """Whether there are more of one kind than of another."""
    return grouped((YES_NO[more < 0], names) for more, names in _tallies(view) if more)


def are_equal(view: SceneView) -> Options:
    """Whether there are as many of one kind as of another."""
    return grouped((YES_NO[more != 0], names) for more, names in _tallies(view))


def which_more(view: SceneView) -> Options:
    """Of which of two kinds there are more."""
    return grouped(("{k}" if more > 0 else "{l}", names) for more, names in _tallies(view) if more)


def how_many_more(view: SceneView) -> Options:
    """How many more there are of one kind than of another."""
    return grouped((str(more), names) for more, names in _tallies(view) if more > 0)

"""Questions about clips: the forms and their wordings, one a line."""

from __future__ import annotations

from collections.abc import Callable

from lmm_jax.demo.asking import YES_NO, Form, Options, grouped
from lmm_jax.demo.clips import DIRECTIONS, KINDS, REVERSIBLE, Clip, Event
from lmm_jax.demo.options import region_of
from lmm_jax.demo.world import COLOURS, Thing

TYPES = ("what", "where", "change", "order")

_BASE = {
    "moves": "move",
    "changes colour": "change colour",
    "changes color": "change color",
    "appears": "appear",
    "disappears": "disappear",
}
_VERBS = {  # what may be said of an event, by its kind; the first words are those of questions about order
    "move": ("moves",),
    "change": ("changes colour", "changes color"),
    "visit": ("appears", "disappears"),
    "appear": ("appears",),
    "disappear": ("disappears",),
}


class ClipView:
    """A clip with the ways to refer to its things; see `asking.View`."""

    def __init__(self, clip: Clip) -> None:
        """Notes who has which colours and shapes at any time."""
        self.clip = clip
        self._events = {e.thing: e for e in clip.events}
        self._colours = [{t.colour} | self._new_colour(i) for i, t in enumerate(clip.things)]

    def _new_colour(self, i: int) -> set[str]:
        event = self._events.get(i)
        return {event.after.colour} if event and event.after else set()

    def phrases(self, thing: Thing, hidden: str = "") -> list[str]:
        """See `asking.View`. Only a thing that keeps its colour is called by it."""
        i = next(i for i, t in enumerate(self.clip.things) if t is thing)
        others = [(c, t.shape) for j, t in enumerate(self.clip.things) if j != i for c in self._colours[j]]
        found = [thing.shape] if all(shape != thing.shape for _, shape in others) else []
        if len(self._colours[i]) == 1 and hidden != "colour":
            found += [f"{thing.colour} object"] if all(c != thing.colour for c, _ in others) else []
            found += [thing.name] if (thing.colour, thing.shape) not in others else []
        return found

    def name(self, event: Event) -> str:
        """What an answer calls the thing of an event: colour and shape, or the shape alone of one that changes colour."""
        thing = self.clip.things[event.thing]
        return thing.shape if event.kind == "change" else thing.name

    def acting(self, *kinds: str, hidden: str = "") -> list[tuple[Event, Thing]]:
        """The events of these kinds, with their things, as far as these can be referred to."""
        found = [(e, self.clip.things[e.thing]) for e in self.clip.events if e.kind in kinds]
        return [(e, t) for e, t in found if self.phrases(t, hidden)]

    def idle(self, *kinds: str, hidden: str = "") -> list[Thing]:
        """The things that can be referred to and to which nothing of these kinds happens."""
        acting = {e.thing for e in self.clip.events if e.kind in kinds}
        return [t for i, t in enumerate(self.clip.things) if i not in acting and self.phrases(t, hidden)]

    def doing(self, verb: str) -> list[Event]:
        """All events of which the verb may be said, in order."""
        return [e for e in self.clip.events if verb in _VERBS[e.kind]]


# ---- options: answer -> slots


def _who(*verbs: str) -> Callable[[ClipView], Options]:
    def options(view: ClipView) -> Options:
        found = [(view.doing(verb), verb) for verb in verbs]
        return grouped((view.name(events[0]), {"verb": verb}) for events, verb in found if len(events) == 1)

    return options


def _fate(view: ClipView) -> Options:
    acting = [(e.verb, t) for e, t in view.acting("move", "change", "appear", "disappear", hidden="colour")]
    return grouped((verb, {"a": t}) for verb, t in [*acting, *(("nothing", t) for t in view.idle(*KINDS, hidden="colour"))])


def _does(kind: str, hidden: str = "") -> Callable[[ClipView], Options]:
    def options(view: ClipView) -> Options:
        verbs = [_BASE[verb] for verb in _VERBS[kind]]
        acting = [t for _, t in view.acting(kind, hidden=hidden)]
        return {
            "yes": [{"a": t, "base": v} for t in acting for v in verbs],
            "no": [{"a": t, "base": v} for t in view.idle(kind, hidden=hidden) for v in verbs],
        }

    return options


def _direction(*among: str) -> Callable[[ClipView], Options]:
    return lambda view: grouped((e.direction, {"a": t}) for e, t in view.acting("move") if e.direction in among)


def _is_direction(view: ClipView) -> Options:
    found = [(e, t, d) for e, t in view.acting("move") for d in DIRECTIONS]
    return grouped((YES_NO[e.direction != d], {"a": t, "direction": d}) for e, t, d in found)


def _sole_direction(view: ClipView) -> Options:
    moves = view.doing("moves")
    return {moves[0].direction: [{}]} if len(moves) == 1 else {}


def _region(view: ClipView) -> Options:
    found = [(region_of(t), t) for _, t in view.acting("appear", "visit")]
    return grouped((region, {"a": t}) for region, t in found if region)


def _colour(when: int) -> Callable[[ClipView], Options]:
    return lambda view: grouped(((t, e.after)[when].colour, {"a": t}) for e, t in view.acting("change"))


def _turns(view: ClipView) -> Options:
    found = [(e, t, c) for e, t in view.acting("change") for c in COLOURS if c != t.colour]
    return grouped((YES_NO[e.after.colour != c], {"a": t, "value": c}) for e, t, c in found)


def _extreme(index: int) -> Callable[[ClipView], Options]:
    def options(view: ClipView) -> Options:
        found = [(view.doing(verb), verb) for kind in REVERSIBLE for verb in _VERBS[kind]]
        asked = [(es, verb) for es, verb in found if len(es) > 1 and all(e.kind in REVERSIBLE for e in es)]
        return grouped((view.name(es[index]), {"verb": verb}) for es, verb in asked)

    return options


def _order(*answers: str) -> Callable[[ClipView], Options]:
    """Pairs of events; the first answer where the first of a pair comes first."""

    def options(view: ClipView) -> Options:
        acting = [(e, t, _VERBS[e.kind][0]) for e, t in view.acting(*REVERSIBLE)]
        pairs = [(x, y) for x in acting for y in acting if x is not y]
        return grouped(
            (answers[e.start > f.start], {"a": a, "verb": v, "base": _BASE[v], "b": b, "verb_b": w, "base_b": _BASE[w]})
            for (e, a, v), (f, b, w) in pairs
        )

    return options


def _order_alike(*answers: str) -> Callable[[ClipView], Options]:
    """The same for events of one kind."""
    order = _order(*answers)
    return lambda view: {answer: [s for s in slots if s["verb"] == s["verb_b"]] for answer, slots in order(view).items()}


FORMS = (
    Form(
        "what",
        _who("moves", "appears", "disappears"),
        """
        What {verb}?
        Which object {verb}?
        What {verb} in the clip?
        Which thing {verb} in the video?
        """,
    ),
    Form(
        "what",
        _fate,
        """
        What does the {a} do?
        What happens to the {a}?
        What does the {a} do in the clip?
        Tell me what happens to the {a} in the video.
        """,
        hidden="colour",
        weights={"nothing": 0.5},
    ),
    Form(
        "what",
        _does("move"),
        """
        Does the {a} move?
        Does the {a} move in the clip?
        Can you see the {a} move?
        Is it true that the {a} moves?
        """,
        YES_NO,
    ),
    Form(
        "where",
        _direction(*DIRECTIONS),
        """
        Where does the {a} go?
        Where does the {a} move?
        In which direction does the {a} move?
        Which way does the {a} go?
        """,
    ),
    Form(
        "where",
        _sole_direction,
        """
        Where does the moving object go?
        In which direction does something move?
        Which way does the moving thing go?
        Where does the object that moves go?
        """,
    ),
    Form(
        "where",
        _direction("left", "right"),
        """
        Does the {a} move left or right?
        Does the {a} go to the left or to the right?
        Left or right: where does the {a} go?
        Which way does the {a} move, left or right?
        """,
    ),
    Form(
        "where",
        _direction("up", "down"),
        """
        Does the {a} move up or down?
        Does the {a} go up or down in the clip?
        Up or down: where does the {a} go?
        Which way does the {a} move, up or down?
        """,
    ),
    Form(
        "where",
        _is_direction,
        """
        Does the {a} move {direction}?
        Does the {a} go {direction}?
        Does the {a} move {direction} in the clip?
        Is it true that the {a} moves {direction}?
        """,
        YES_NO,
    ),
    Form(
        "where",
        _region,
        """
        Where does the {a} appear?
        In which corner does the {a} appear?
        In which part of the picture does the {a} appear?
        Where in the picture does the {a} appear?
        """,
    ),
    Form(
        "change",
        _colour(1),
        """
        What colour does the {a} become?
        What color does the {a} turn?
        Which colour does the {a} have at the end?
        What color is the {a} at the end?
        """,
    ),
    Form(
        "change",
        _colour(0),
        """
        What colour was the {a} at first?
        What color does the {a} have at the start?
        Which colour did the {a} have at first?
        What color was the {a} before it changed?
        """,
    ),
    Form(
        "change",
        _who("changes colour", "changes color"),
        """
        What {verb}?
        Which shape {verb}?
        Which object {verb}?
        What {verb} in the clip?
        """,
    ),
    Form(
        "change",
        _does("change", "colour"),
        """
        Does the {a} {base}?
        Does the {a} {base} in the clip?
        Can you see the {a} {base}?
        Does the {a} {base} in the video?
        """,
        YES_NO,
        "colour",
    ),
    Form(
        "change",
        _turns,
        """
        Does the {a} turn {value}?
        Does the {a} become {value}?
        Is the {a} {value} at the end?
        Does the {a} turn {value} in the clip?
        """,
        YES_NO,
    ),
    Form(
        "order",
        _extreme(0),
        """
        What {verb} first?
        Which object {verb} first?
        Which thing is the first that {verb}?
        Which object is the first that {verb}?
        """,
    ),
    Form(
        "order",
        _extreme(-1),
        """
        What {verb} last?
        Which object {verb} last?
        Which thing is the last that {verb}?
        Which object is the last that {verb}?
        """,
    ),
    Form(
        "order",
        _order(*YES_NO),
        """
        Does the {a} {base} before the {b} {verb_b}?
        Is it true that the {a} {verb} before the {b} {verb_b}?
        Does the {b} {base_b} after the {a} {verb}?
        Is it true that the {b} {verb_b} after the {a} {verb}?
        """,
        YES_NO,
    ),
    Form(
        "order",
        _order("{a}", "{b}"),
        """
        Which comes first, the {a} that {verb} or the {b} that {verb_b}?
        What is first: the {a} that {verb} or the {b} that {verb_b}?
        What happens first, does the {a} {base} or does the {b} {base_b}?
        Which is earlier, the {a} that {verb} or the {b} that {verb_b}?
        """,
        ("{a}", "{b}"),
    ),
    Form(
        "order",
        _order_alike("{a}", "{b}"),
        """
        Which {verb} first, the {a} or the {b}?
        What {verb} first: the {a} or the {b}?
        Does the {a} or the {b} {base} first?
        Which of the two {verb} first, the {a} or the {b}?
        """,
        ("{a}", "{b}"),
    ),
    Form(
        "order",
        _order_alike("{b}", "{a}"),
        """
        Which {verb} last, the {a} or the {b}?
        What {verb} last: the {a} or the {b}?
        Does the {a} or the {b} {base} last?
        Which of the two {verb} last, the {a} or the {b}?
        """,
        ("{a}", "{b}"),
    ),
)

"""Answers questions of the small visual world from the words of the question and from what is to be seen, nothing else."""

import re

from lmm_jax.demo.world import COLOURS, SHAPES, SIZES

SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1), "under": (0, 1)}
EXTREMES = {"left": (-1, 0), "right": (1, 0), "highest": (0, -1), "lowest": (0, 1)}
CENTRE = 64
VERB = "moves?|changes? colou?r|(?:dis)?appears?"
NOUN = rf"(?:{'|'.join((*SIZES, *COLOURS, *SHAPES, 'object'))}| (?!$))+"
PATTERNS = dict.fromkeys(("verb", "base", "verb_b", "base_b"), VERB) | dict.fromkeys("ab", NOUN)


def slots(question):
    """What stands in the slots of the template."""
    parts = re.split(r"\{(\w+)\}", question.template)  # text and names in turn
    named = (f"(?P<{p}>{PATTERNS.get(p, '.+')})" if i % 2 else re.escape(p) for i, p in enumerate(parts))
    return re.fullmatch("".join(named), question.text).groupdict()


def matching(things, phrase):
    words = re.sub(r"^an? ", "", phrase).split()
    wanted = [w if w in (*SHAPES, *COLOURS, *SIZES) else w.removesuffix("s") for w in words]
    assert all(w in (*SHAPES, *COLOURS, *SIZES, "object") for w in wanted), phrase
    return [t for t in things if all(w in (t.size, t.colour, t.shape) for w in wanted if w != "object")]


def the(things, phrase):
    (thing,) = matching(things, phrase)  # exactly one
    return thing


def region(thing):
    return f"{'top' if thing.y < CENTRE else 'bottom'} {'left' if thing.x < CENTRE else 'right'}"


def yes(truth):
    return "yes" if truth else "no"


def ahead(a, b, side):
    dx, dy = SIDES[side.removeprefix("to the ")]
    return dx * (a.x - b.x) + dy * (a.y - b.y)


def place(things, words):
    """The thing that is meant by "side + other thing" or by a corner."""
    if "region" in words:
        (thing,) = (t for t in things if region(t) == words["region"])
    else:
        other = the(things, words["a"])
        (thing,) = (t for t in things if t is not other and ahead(t, other, words["side"]) > 0)
    return thing


def answer(question, things):
    """The answer to a question about a picture with these things."""
    words, text = slots(question), question.template
    named = {k: the(things, words[k]) for k in "ab" if k in words}
    a, b = named.get("a"), named.get("b")
    if question.type in ("colour", "shape"):
        thing = place(things, words) if "region" in words or "side" in words else a
        value = getattr(thing, question.type)
        return yes(value == words["value"]) if "value" in words else value
    if question.type == "count":
        return str(len(matching(things, words.get("kinds", "object"))))
    if question.type == "existence":
        return yes(matching(things, words.get("kind") or words["kinds"]))
    if question.type == "position":
        return position(text, words, things, a)
    if question.type == "relation":
        return relation(text, words, things, a, b)
    return comparison(text, words, things, a, b)


def position(text, words, things, a):
    if "extreme" in words:
        dx, dy = EXTREMES[words["extreme"].split()[-1]]
        return max(things, key=lambda t: dx * t.x + dy * t.y).name
    if "region" in words:
        return yes(region(a) == words["region"]) if a else place(things, words).name
    if "right" in text:
        return "left" if a.x < CENTRE else "right"
    if "bottom" in text:
        return "top" if a.y < CENTRE else "bottom"
    return region(a)


def relation(text, words, things, a, b):
    if b is None:
        return place(things, words).name
    if "side" in words:
        return yes(ahead(a, b, words["side"]) > 0)
    across, down = a.x - b.x, a.y - b.y
    if "right" in text or ("below" not in text and abs(across) > abs(down)):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def comparison(text, words, things, a, b):
    if "k" in words:
        k, other = (len(matching(things, words[name])) for name in "kl")
        if re.search("how many", text, re.I):
            return str(k - other)
        if "as many" in text or "number" in text:
            return yes(k == other)
        return yes(k > other) if "than" in text else words["k" if k > other else "l"]
    if b is None:
        return a.size
    if "same" in text:
        name = text.split("same ")[1].split()[0].strip("?").replace("color", "colour")
        return yes(getattr(a, name) == getattr(b, name))
    assert a.size != b.size
    right = a.size == ("small" if "smaller" in text else "large")
    return yes(right) if "than" in text else words["a" if right else "b"]


class Seen:
    """What becomes of one thing over the frames that are looked at; its states there, None where it is not to be seen."""

    def __init__(self, states):
        there = [s for s in states if s]
        self.shape, self.size, self.first, self.last = there[0].shape, there[0].size, there[0], there[-1]
        self.colours = {s.colour for s in there}
        dx, dy = self.last.x - self.first.x, self.last.y - self.first.y
        self.verbs, self.fate = [], "nothing"
        if len(there) < len(states):
            self.verbs = ["appear"] * (states[0] is None) + ["disappear"] * (states[-1] is None)
            self.fate = f"{self.verbs[0]}s"
        elif len(self.colours) > 1:
            self.verbs, self.fate = ["change colour"], f"turns {self.last.colour}"
        elif dx or dy:
            side = ("left", "right")[dx > 0] if abs(dx) > abs(dy) else ("up", "down")[dy > 0]
            assert min(abs(dx), abs(dy)) == 0 and max(abs(dx), abs(dy)) > 30
            self.verbs, self.fate = ["move"], f"moves {side}"
        if not self.verbs and states[0] is None:
            self.verbs = ["appear", "disappear"]
        self.time = next((i for i, s in enumerate(states) if s != states[0]), None)

    @property
    def name(self):
        return self.shape if len(self.colours) > 1 else f"{self.first.colour} {self.shape}"

    def is_called(self, phrase):
        words = [w for w in phrase.split() if w != "object"]
        return all(w == self.shape or w in self.colours for w in words)


def clip_answer(question, seen):
    """The answer to a question about a clip in which these things (`Seen`) are seen."""
    words, text = slots(question), question.template

    def the(phrase):
        (thing,) = (s for s in seen if s.is_called(phrase))
        return thing

    verb = words.get("verb", words.get("base", "")).replace("color", "colour").replace("changes", "change").removesuffix("s")
    doing = sorted((s for s in seen if verb and verb in s.verbs), key=lambda s: s.time)
    a = the(words["a"]) if "a" in words else None
    if question.type == "order":
        return order(text, words, a, the(words["b"]) if "b" in words else None, doing)
    if "value" in words:
        return yes(a.last.colour == words["value"] and len(a.colours) > 1)
    if "base" in words:
        return yes(verb in a.verbs)
    if verb:
        (only,) = doing
        return only.name
    if question.type == "change":
        return (a.first if re.search("first|start|before", text) else a.last).colour
    if "direction" in words:
        return yes(a.fate == f"moves {words['direction']}")
    if "appear" in text:
        return region(a.first)
    if question.type == "where":
        (mover,) = [a] if a else [s for s in seen if "move" in s.verbs]
        return mover.fate.removeprefix("moves ")
    return yes("move" in a.verbs) if " move" in text else a.fate


def order(text, words, a, b, doing):
    if b is None:
        return doing[-1 if "last" in text else 0].name
    if "before" in text or "after" in text:
        return yes(a.time < b.time)
    return words["a" if (a.time < b.time) != ("last" in text) else "b"]

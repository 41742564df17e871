"""How questions are made, of pictures and of clips alike.

A `Form` lists, for one scene, every question of its kind together with the answer. The answer is chosen first and the
question second, so that the question alone says little about the answer: where the answers are yes and no, a form is only
used on scenes that allow both, and each comes half of the time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lmm_jax.demo.world import COLOURS, SHAPES, SIZES, Thing, choose

YES_NO = ("yes", "no")

Slots = dict[str, Any]  # what stands in for {a} in a template: a text, or a `Thing` to be referred to
Options = Mapping[str, Sequence[Slots]]  # answer -> the questions that have it
Kind = tuple[str, str, str]  # size, colour and shape, "" where any will do


@dataclasses.dataclass(frozen=True)
class Question:
    """One question with its only right answer."""

    type: str
    text: str
    answer: str
    template: str  # the text with its slots unfilled
    subject: tuple[str, ...]  # the same for other wordings of the same question


class View(Protocol):
    """A scene as far as it can be asked about. It knows how to refer to a thing so that no other can be meant."""

    def phrases(self, thing: Thing, hidden: str = "") -> list[str]:
        """The phrases, without article, for exactly this thing that do not tell its `hidden` attribute."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One kind of question. Answers may have slots too."""

    type: str
    options: Callable[[Any], Options]
    wordings: str  # templates, one a line
    needs: tuple[str, ...] = ()  # answers that must all be possible
    hidden: str = ""  # attribute that the question must not tell
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the answers, 1 where not given

    def ask(self, view: View, rng: np.random.Generator) -> Question | None:
        """A question of this form, or None if the scene allows none."""
        options = {answer: slots for answer, slots in self.options(view).items() if slots}
        if not options or any(answer not in options for answer in self.needs):
            return None
        answers = sorted(options)
        total = np.cumsum([self.weights.get(a, 1.0) for a in answers])
        answer = answers[int(np.searchsorted(total, rng.random() * total[-1], "right"))]
        slots, template = choose(rng, options[answer]), choose(rng, lines(self.wordings))
        words = {k: choose(rng, view.phrases(v, self.hidden)) if isinstance(v, Thing) else v for k, v in slots.items()}
        subject = (self.wordings, *words.values())
        return Question(self.type, template.format(**words), answer.format(**words), template, subject)


@functools.cache
def lines(text: str) -> tuple[str, ...]:
    """The lines of a text block, without indentation and empty ones."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def ask_each(view: View, forms: Sequence[Form], rng: np.random.Generator) -> list[Question]:
    """One question of every type that the scene allows, in the order of the types in `forms`."""
    asked = (_ask_type(view, forms, type_, rng) for type_ in dict.fromkeys(f.type for f in forms))
    return [q for q in asked if q]


def ask_several(
    view: View, forms: Sequence[Form], number: int, rng: np.random.Generator, times: Mapping[str, int]
) -> list[Question]:
    """`number` different questions of all types in turn, or fewer where the scene does not allow as many.

    In a turn, a type is asked `times` as often, once where that does not tell.
    """
    types, asked = [t for t in dict.fromkeys(f.type for f in forms) for _ in range(times.get(t, 1))], {}
    for _ in range(3):  # rounds in which nothing new may be found
        for i in rng.permutation(len(types)):
            question = _ask_type(view, forms, types[i], rng)
            if question and len(asked) < number:
                asked.setdefault(question.subject, question)
        if len(asked) == number:
            break
    return list(asked.values())


def _ask_type(view: View, forms: Sequence[Form], type_: str, rng: np.random.Generator) -> Question | None:
    mine = [f for f in forms if f.type == type_]
    asked = (mine[i].ask(view, rng) for i in rng.permutation(len(mine)))
    return next((q for q in asked if q), None)


def guess_rate(seen: Iterable[Question], asked: Iterable[Question], key: str = "text") -> dict[str, float]:
    """How often the answer is guessed right without a look at the picture: the best that a blind player can do.

    Args:
      seen: questions from which the player knows the most frequent answer to each `key`.
      asked: other questions; where the key is new to the player, the most frequent answer to its template is guessed.
      key: "text" or "template".

    Returns:
      The part guessed right, of each type and of "all".
    """
    answers: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for q in seen:
        for name in {key, "template", "type"}:
            answers[name, getattr(q, name)][q.answer] += 1
    right = defaultdict(list)
    for q in asked:
        known = next((k for name in (key, "template", "type") if (k := (name, getattr(q, name))) in answers), None)
        guess = answers[known].most_common(1)[0][0] if known else ""
        right[q.type].append(guess == q.answer)
        right["all"].append(guess == q.answer)
    return {name: float(np.mean(hits)) for name, hits in right.items()}


def grouped(pairs: Iterable[tuple[str, Slots]]) -> Options:
    """(answer, slots) by answer."""
    options = defaultdict(list)
    for answer, slots in pairs:
        options[answer].append(slots)
    return options


def kinds_of(thing: Thing) -> list[Kind]:
    """All kinds that a thing belongs to: with or without its size, its colour and its shape."""
    return [(s, c, f) for s in ("", thing.size) for c in ("", thing.colour) for f in ("", thing.shape)]


def told(kind: Kind) -> tuple[str, ...]:
    """Which attributes a kind is about."""
    return tuple(name for name, value in zip(("size", "colour", "shape"), kind) if value)


def kind_name(kind: Kind) -> str:
    """In words, without article: "small red circle", "red object"."""
    return " ".join(filter(None, (*kind[:2], kind[2] or "object")))


ALL_KINDS = tuple((s, c, f) for s in ("", *SIZES) for c in ("", *COLOURS) for f in ("", *SHAPES))


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

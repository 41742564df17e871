"""What a reply says: pure functions of strings, each as the published scorers read it (evaluation spec section 3)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmm_jax.errors import UserError
from lmm_jax.evaluation.normaliser import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION

REFERENCES = 10  # answers of people to a question of VQA's kind

_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # no more are deleted: the published code gives a flag of `re` in place of a count
_AGREEMENT = (0.0, 0.3, 0.6, 0.9, 1.0)  # by how many references agree; all beyond four are as four
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
_SCIENCEQA_LETTERS = "ABCDE"


def normalise(answer: str) -> str:
    """An answer in the form in which answers of VQA's kind are compared (evaluation spec section 3.1).

    Lower-case, without punctuation and articles, with digits for number words up to ten; faithful to the published code
    down to its slips, as figures are.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = before = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in PUNCTUATION:
        if mark in before:
            beside_space = f"{mark} " in before or f" {mark}" in before
            text = text.replace(mark, "" if beside_space else " ")
    words = _PERIOD.sub("", text, count=_PERIODS).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """How right a prediction is, 0 to 1: the mean over all sets of nine of min(1, agreeing / 3) (evaluation spec 3.2).

    Args:
      prediction: as it was given; it is normalised here, as the references are.
      references: ten.

    Raises:
      UserError: they are not ten.
    """
    if len(references) != REFERENCES:
        raise UserError(f"there are {len(references)} reference answers: VQA accuracy is defined for {REFERENCES}")
    prediction = normalise(prediction)
    return _AGREEMENT[min(4, sum(normalise(reference) == prediction for reference in references))]


def pope_says_yes(reply: str) -> bool:
    """Whether a reply counts as yes in POPE: unless a word before the first period is No, no or not (section 3.3)."""
    words = reply.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def mme_answer(reply: str) -> str:
    """A reply as MME reads it: yes, no or other, by its first four characters alone (section 3.4)."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def exact_letter(reply: str, letters: str = "ABCD") -> str:
    """The reply, if it is one of the letters and nothing more; else "" (section 3.5)."""
    return reply if len(reply) == 1 and reply in letters else ""


def scienceqa_letter(reply: str) -> str:
    """The letter that a reply to ScienceQA names; "" where it names none (section 3.5). It may be one that is not offered."""
    if exact_letter(reply, _SCIENCEQA_LETTERS):
        return reply
    if len(reply) >= 3 and reply[0] in _SCIENCEQA_LETTERS and reply[1:3] == ". ":
        return reply[0]
    found = _THE_ANSWER_IS.findall(reply)
    return found[0] if len(found) == 1 else ""


def strict_letter(reply: str) -> str:
    """The character before the first closing parenthesis, or the whole reply if it has none (section 3.5).

    Only a reply like "B", "(B)" or "B) a cup" so equals a letter. "" where nothing stands before the parenthesis.
    """
    start, parenthesis, _ = reply.partition(")")
    return start[-1:] if parenthesis else reply


def first_capital(reply: str, options: int, otherwise: str = "A") -> str:
    """The first character that is the letter of one of so many options, or `otherwise` (section 3.5).

    A lenient rule: it reads "Answer: B" and "An apple" as A.
    """
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:options]
    return next((character for character in reply if character in letters), otherwise)

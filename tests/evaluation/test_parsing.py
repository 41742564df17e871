import random

import pytest
from eval_fixtures import golden

from lmm_jax.errors import UserError
from lmm_jax.evaluation import normaliser
from lmm_jax.evaluation.parsing import (
    exact_letter,
    first_capital,
    mme_answer,
    normalise,
    pope_says_yes,
    scienceqa_letter,
    strict_letter,
    vqa_accuracy,
)


@pytest.mark.parametrize("case", golden("answer_normaliser/expected.json"), ids=lambda case: repr(case["input"]))
def test_normaliser(case):
    assert normalise(case["input"]) == case["output"]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("3.", "3"),
        ("u.s.a.", "usa"),
        ("5.x", "5x"),  # "not preceded by a digit" is a slip of the published pattern, without effect
        (".٣", ".٣"),  # any decimal digit of Unicode
        ("." * 40 + "x", "." * 8 + "x"),  # at most 32
        ("Im", "im"),  # keys with capitals never match
        ("ten eleven", "10 eleven"),
        ("a\tb\nc", "b c"),
        ("left - right-hand", "left righthand"),  # a mark beside a space anywhere is deleted everywhere
        ("what's? up", "what 's up"),
        ("don't & can't: x", "don't & can't: x"),
    ],
)
def test_normaliser_by_the_rules(answer, expected):
    assert normalise(answer) == expected


def test_the_normalisers_tables_are_the_published_ones():
    tables = golden("protocol_constants.json")["answer_normaliser"]
    assert tables["contractions"] == normaliser.CONTRACTIONS
    assert len(normaliser.CONTRACTIONS) == 120
    assert tables["number_words"] == normaliser.NUMBERS
    assert set(tables["articles"]) == normaliser.ARTICLES
    assert tables["punctuation_in_order"] == list(normaliser.PUNCTUATION)


@pytest.mark.parametrize("case", golden("vqa_accuracy/expected.json"))
def test_vqa_accuracy(case):
    assert vqa_accuracy(case["prediction"], case["answers"]) == case["score"]


def test_vqa_accuracy_is_the_mean_over_all_nine():
    rng = random.Random(0)
    for _ in range(200):
        references = [rng.choice("xyz") for _ in range(10)]
        others = [references[:i] + references[i + 1 :] for i in range(10)]
        expected = sum(min(1, nine.count("x") / 3) for nine in others) / 10
        assert vqa_accuracy("X.", references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("references", [[], ["x"] * 9, ["x"] * 11])
def test_vqa_accuracy_wants_ten_references(references):
    with pytest.raises(UserError, match=f"{len(references)} reference answers"):
        vqa_accuracy("x", references)


@pytest.mark.parametrize(
    "reply, yes",
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("no,", False),
        ("NO", True),
        ("Nope", True),
        ("None", True),
        ("", True),
        ("I do not know", False),
        ("There is no car. Yes", False),
        ("Yes. No", True),
        ("Is it?\nno", True),  # words are split at spaces alone
    ],
)
def test_pope(reply, yes):
    assert pope_says_yes(reply) is yes


@pytest.mark.parametrize(
    "reply, answer",
    [
        ("Yes", "yes"),
        ("eyes", "yes"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("NO.", "no"),
        ("none", "no"),
        ("Not sure", "no"),
        ("I think yes", "other"),
        ("y", "other"),
        ("", "other"),
    ],
)
def test_mme(reply, answer):
    assert mme_answer(reply) == answer


@pytest.mark.parametrize("case", golden("option_parsing/expected.json"), ids=lambda case: repr(case["reply"]))
def test_option_letters(case):
    reply = case["reply"]
    assert first_capital(reply, 4) == case["first_letter_of_4 (default A)"]
    assert first_capital(reply, 2) == case["first_letter_of_2 (default A)"]
    letter = first_capital(reply, 5, otherwise="")
    assert ("ABCDE".index(letter) if letter else -1) == case["egoschema_index (default -1)"]
    assert (strict_letter(reply) == "B") is case["strict_check_vs_(B) cup"]


def test_a_parenthesis_after_nothing_names_no_letter():
    assert strict_letter(")") == strict_letter(") B") == ""
    assert strict_letter("(B) or (C)") == "B"


@pytest.mark.parametrize("reply, letter", [("A", "A"), ("E", ""), ("b", ""), ("C.", ""), ("AB", ""), ("", ""), (" A", "")])
def test_exact_letter(reply, letter):
    assert exact_letter(reply) == letter


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("A", "A"),
        ("E", "E"),
        ("F", ""),
        ("A. red", "A"),
        ("A.", ""),
        ("A.x", ""),
        ("F. red", ""),
        ("(B)", ""),
        ("b", ""),
        ("The answer is C.", "C"),
        ("So The answer is Z!", "Z"),
        ("The answer is C", ""),  # a character must follow
        ("The answer is C\n", ""),  # and no line end
        ("the answer is C.", ""),
        ("The answer is A. No, The answer is C.", ""),
        ("", ""),
    ],
)
def test_scienceqa(reply, letter):
    assert scienceqa_letter(reply) == letter

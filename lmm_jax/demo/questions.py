"""Questions about pictures: the forms and their wordings, one a line."""

from __future__ import annotations

from lmm_jax.demo import options
from lmm_jax.demo.asking import YES_NO, Form
from lmm_jax.demo.world import COLOURS, SHAPES, SIZES

TYPES = ("colour", "shape", "count", "position", "existence", "relation", "comparison")

_COUNT_WEIGHTS = {"0": 1.0, "1": 1.0, "2": 1.5, "3": 3.0, "4": 5.0, "5": 7.0}  # scenes allow the higher ones less often

_EXISTENCE = """
    Is there {kind} in the picture?
    Does the image show {kind}?
    Can you see {kind}?
    Are there any {kinds} here?
    Is {kind} in this image?
"""
_COUNT = """
    How many {kinds} are there?
    How many {kinds} are in the picture?
    How many {kinds} can you see?
    Count the {kinds} in the image.
    What is the number of {kinds}?
"""
_WHICH_SIZE = """
    Which is LARGER, the {a} or the {b}?
    Which of the two is LARGER: the {a} or the {b}?
    Which object is LARGER, the {a} or the {b}?
    What is LARGER, the {a} or the {b}?
"""
_IS_SIZE = """
    Is the {a} LARGER than the {b}?
    Would you say that the {a} is LARGER than the {b}?
"""
_SAME = """
    Is the {a} the same SHAPE as the {b}?
    Does the {a} have the same SHAPE as the {b}?
    Do the {a} and the {b} have the same SHAPE?
    Are the {a} and the {b} of the same SHAPE?
"""


def _by_size(size: str, *words: str) -> list[Form]:
    which, check = ("".join(text.replace("LARGER", w) for w in words) for text in (_WHICH_SIZE, _IS_SIZE))
    return [
        Form("comparison", options.unequal(size, "{a}", "{b}"), which, ("{a}", "{b}"), "size"),
        Form("comparison", options.unequal(size, *YES_NO), check, YES_NO, "size"),
    ]


def _same(attribute: str, *words: str) -> Form:
    return Form("comparison", options.same(attribute), "".join(_SAME.replace("SHAPE", w) for w in words), YES_NO, attribute)


FORMS = (
    Form(
        "colour",
        options.attribute("colour"),
        """
        What colour is the {a}?
        What color is the {a}?
        Which colour does the {a} have?
        What is the color of the {a}?
        Tell me the colour of the {a}.
        """,
        hidden="colour",
    ),
    Form(
        "colour",
        options.within("colour"),
        """
        What colour is the object in the {region}?
        What color is the thing at the {region}?
        Which colour does the object at the {region} have?
        What is the color of the object in the {region} of the picture?
        """,
    ),
    Form(
        "colour",
        options.beside("colour"),
        """
        What colour is the object {side} the {a}?
        What color is the thing {side} the {a}?
        Which colour does the object {side} the {a} have?
        What is the color of the object {side} the {a}?
        """,
    ),
    Form(
        "colour",
        options.attribute_check("colour", COLOURS),
        """
        Is the {a} {value}?
        Is the colour of the {a} {value}?
        Is {value} the color of the {a}?
        Does the {a} look {value}?
        """,
        YES_NO,
        "colour",
    ),
    Form(
        "shape",
        options.attribute("shape"),
        """
        What shape is the {a}?
        Which shape does the {a} have?
        What is the shape of the {a}?
        Tell me the shape of the {a}.
        """,
        hidden="shape",
    ),
    Form(
        "shape",
        options.within("shape"),
        """
        What shape is the object in the {region}?
        What shape is at the {region}?
        Which shape does the thing in the {region} have?
        What is the shape of the object in the {region} of the image?
        """,
    ),
    Form(
        "shape",
        options.beside("shape"),
        """
        What shape is the object {side} the {a}?
        What shape is {side} the {a}?
        Which shape does the thing {side} the {a} have?
        What is the shape of the object {side} the {a}?
        """,
    ),
    Form(
        "shape",
        options.attribute_check("shape", SHAPES),
        """
        Is the {a} a {value}?
        Does the {a} have the shape of a {value}?
        Is the shape of the {a} a {value}?
        Does the {a} look like a {value}?
        """,
        YES_NO,
        "shape",
    ),
    *2 * (Form("count", options.count, _COUNT, weights=_COUNT_WEIGHTS),),
    Form(
        "count",
        options.count_all,
        """
        How many objects are there?
        How many objects are in the image?
        How many things can you see in the picture?
        Count the objects.
        What is the number of objects in the picture?
        """,
    ),
    Form(
        "position",
        options.corner,
        """
        Where is the {a}?
        Where in the picture is the {a}?
        In which corner is the {a}?
        In which part of the image is the {a}?
        What is the position of the {a}?
        """,
    ),
    Form(
        "position",
        options.within("name"),
        """
        What is in the {region}?
        What is at the {region} of the picture?
        Which object is in the {region}?
        What can you see in the {region} of the image?
        """,
    ),
    Form(
        "position",
        options.is_in,
        """
        Is the {a} in the {region}?
        Is the {a} at the {region} of the picture?
        Can you see the {a} in the {region}?
        Is the position of the {a} {region}?
        """,
        YES_NO,
    ),
    Form(
        "position",
        options.which_half("x", "left", "right"),
        """
        Is the {a} on the left or on the right?
        Is the {a} in the left or the right half of the picture?
        Which half of the image is the {a} in, left or right?
        Left or right: where is the {a}?
        """,
    ),
    Form(
        "position",
        options.which_half("y", "top", "bottom"),
        """
        Is the {a} at the top or at the bottom?
        Is the {a} in the top or the bottom half of the picture?
        Which half of the image is the {a} in, top or bottom?
        Top or bottom: where is the {a}?
        """,
    ),
    Form(
        "position",
        options.outermost,
        """
        Which object is {extreme}?
        What is {extreme} in the picture?
        Which thing is {extreme}?
        Tell me which object is {extreme}.
        """,
    ),
    Form("existence", options.existence("colour", "shape"), _EXISTENCE, YES_NO),
    Form("existence", options.existence("colour"), _EXISTENCE, YES_NO),
    Form("existence", options.existence("shape"), _EXISTENCE, YES_NO),
    Form("existence", options.existence("size", "shape"), _EXISTENCE, YES_NO),
    Form("existence", options.existence("size", "colour"), _EXISTENCE, YES_NO),
    Form(
        "relation",
        options.which_side,
        """
        On which side of the {b} is the {a}?
        Where is the {a}, seen from the {b}?
        Which side of the {b} is the {a} on?
        Where is the {a} relative to the {b}?
        """,
    ),
    Form(
        "relation",
        options.is_on_side,
        """
        Is the {a} {side} the {b}?
        Would you say that the {a} is {side} the {b}?
        Can you see the {a} {side} the {b}?
        Does the {a} lie {side} the {b}?
        """,
        YES_NO,
    ),
    Form(
        "relation",
        options.either_side("left", "right"),
        """
        Is the {a} left or right of the {b}?
        Is the {a} to the left or to the right of the {b}?
        Does the {a} lie left or right of the {b}?
        Left or right of the {b}: where is the {a}?
        """,
    ),
    Form(
        "relation",
        options.either_side("above", "below"),
        """
        Is the {a} above or below the {b}?
        Is the {a} above the {b} or below it?
        Does the {a} lie above or below the {b}?
        Above or below the {b}: where is the {a}?
        """,
    ),
    Form(
        "relation",
        options.beside("name"),
        """
        What is {side} the {a}?
        Which object is {side} the {a}?
        What can you see {side} the {a}?
        Which object lies {side} the {a}?
        """,
    ),
    *_by_size("large", "larger", "bigger"),
    *_by_size("small", "smaller"),
    *3 * (_same("colour", "colour", "color"), _same("shape", "shape"), _same("size", "size")),  # few scenes allow them
    Form(
        "comparison",
        options.attribute("size"),
        """
        Is the {a} small or large?
        Is the {a} large or small?
        Would you say that the {a} is large or small?
        What size is the {a}, small or large?
        """,
        tuple(SIZES),
        "size",
    ),
    Form(
        "comparison",
        options.are_more,
        """
        Are there more {k} than {l}?
        Can you see more {k} than {l}?
        Does the picture show more {k} than {l}?
        Are there fewer {l} than {k}?
        """,
        YES_NO,
    ),
    Form(
        "comparison",
        options.are_equal,
        """
        Are there as many {k} as {l}?
        Can you see as many {k} as {l}?
        Is the number of {k} the same as the number of {l}?
        Does the image show as many {k} as {l}?
        """,
        YES_NO,
    ),
    Form(
        "comparison",
        options.which_more,
        """
        Are there more {k} or more {l}?
        Which are there more of, {k} or {l}?
        What can you see more of: {k} or {l}?
        Does the picture show more {k} or more {l}?
        """,
        ("{k}", "{l}"),
    ),
    Form(
        "comparison",
        options.how_many_more,
        """
        How many more {k} than {l} are there?
        How many more {k} than {l} can you see?
        By how many are there more {k} than {l}?
        How many {k} more than {l} are in the picture?
        """,
        weights={"1": 1.0, "2": 4.0, "3": 8.0, "4": 12.0, "5": 12.0},
    ),
)

"""``lmm inspect``: what a model looks at while it answers, as arrays and plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from lmm_jax.analysis import attention
from lmm_jax.analysis.attention import TYPES, Attention
from lmm_jax.analysis.compression import compression_maps
from lmm_jax.data.conversation import Message
from lmm_jax.errors import UserError
from lmm_jax.inference.assistant import Assistant, Conversation, Question, Video

_SHOWN = 8  # pictures or frames whose maps are drawn
_PAIRS = (("response", "vision"), ("response", "instruction"), ("instruction", "vision"))


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
      answer: that the figures are of.
      seen: attention of all layers.
      hidden: (first and last layer, divergence in nats) for each group of layers without vision tokens.
      pictures: (P,H,W,3) uint8, those whose maps are shown.
      maps: of each of them, (C²,nG,nG); none without a compressor.
    """

    answer: str
    seen: Attention
    hidden: list[tuple[int, int, float]]
    pictures: list[np.ndarray]
    maps: list[np.ndarray]


def inspect(
    assistant: Assistant,
    question: Question,
    *,
    answer: str | None = None,
    group: int | None = None,
    max_new_tokens: int = 64,
    template: str | None = None,
) -> Inspection:
    """Looks at a question and its answer.

    Args:
      assistant: the model.
      question: with at least one picture or a video.
      answer: whose making is looked at; None is the model's own.
      group: layers that the vision tokens are hidden from at a time; None is an eighth of them.
      max_new_tokens: of the model's own answer.
      template: of the prompt; None is the model's own.

    Raises:
      UserError: media that cannot be read, none at all, an answer of no token, a group that is not positive.
    """
    if not question.images and question.video is None:
        raise UserError("nothing to look at: give a picture with --image or a video with --video")
    layers = assistant.config.decoder.num_layers
    group = -(-layers // 8) if group is None else group
    if group < 1:
        raise UserError(f"groups of {group} layers: expected at least 1")
    asked = assistant.extend(Conversation(), question)
    media = [assistant.read_video(m) if isinstance(m, Video) else m for m in asked.media]
    if answer is None:
        (made,) = assistant.answers(
            [Conversation(asked.messages, tuple(media))], max_new_tokens=max_new_tokens, template=template
        )
        answer = made.text
    told = Conversation((*asked.messages, Message("assistant", answer)))
    given = attention.decoder_input(assistant, told, media, template)
    seen = attention.look(assistant, given)
    hidden = []
    for first in range(0, layers, group):
        last = min(first + group, layers) - 1
        blind = attention.look(assistant, given, range(first, last + 1))
        hidden.append((first, last, attention.divergence(seen, blind)))
    pictures = [p for m in media for p in (m if isinstance(m, list) else [m])][:_SHOWN]
    maps = [compression_maps(assistant, p) for p in pictures] if assistant.config.compressor else []
    return Inspection(answer, seen, hidden, pictures, maps)


def table(found: Inspection) -> str:
    """Attention of the answer by layer, and what hiding costs."""
    lines = [f"answer: {found.answer}", "", "| layer | " + " | ".join(f"{a} → {b}" for a, b in _PAIRS) + " |"]
    lines.append("|---" * (1 + len(_PAIRS)) + "|")
    for number, weights in enumerate(found.seen.weights):
        cells = (weights[TYPES.index(a), TYPES.index(b)] for a, b in _PAIRS)
        lines.append(f"| {number} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    lines += ["", "| vision tokens hidden in layers | change of the answer's words, nats |", "|---|---|"]
    lines += [f"| {first} to {last} | {nats:.4f} |" for first, last, nats in found.hidden]
    return "\n".join(lines) + "\n"


def write_arrays(found: Inspection, file: Path) -> None:
    """As an NPZ file: types, weights and entropy by layer, hidden, and the maps of each picture.

    Raises:
      UserError: it cannot be written.
    """
    hidden = np.array(found.hidden, np.float64)
    arrays = {"types": np.array(TYPES), "weights": found.seen.weights, "entropy": found.seen.entropy, "hidden": hidden}
    try:
        np.savez(file, **arrays, **{f"map_{i}": of for i, of in enumerate(found.maps)})
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from error

"""Prompt templates: messages -> spans of text, of which it is known who wrote them (spec section 8).

The joined spans are the prompt. Which of them are answers decides the training labels, which of them people typed decides
where `<image>` stands for an image and where control tokens are only text; `tokenize.Tokenizer.encode` reads both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lmm_jax.config import TEMPLATES
from lmm_jax.errors import UserError

if TYPE_CHECKING:
    from lmm_jax.data.tokenize import Tokenizer

IMAGE = "<image>"
VIDEO = "<video>"  # a video is one placeholder too, whatever the number of its frames

_LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_LLAMA_TWO_BOS = "llava_llama_3_1_two_bos"
_LLAMA_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_LLAMA_END = "<|eot_id|>"

_VICUNA_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions. "
)
_VICUNA_PERSON = {"v1": "user", "llava_v1": "human"}
_VICUNA_END = "</s>"

_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `<image>` in a user's turn stands for an image; in an assistant's turn it is only text."""

    role: Literal["user", "assistant"]
    content: str


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of the prompt. Spans are tokenised together: their borders do not show in the tokens."""

    text: str
    is_answer: bool = False  # an answer or its end token: these positions carry labels
    has_placeholders: bool = False  # `<image>` in it stands for an image
    is_literal: bool = False  # control tokens spelled out in it are text and do not control anything


def from_llava(conversations: Sequence[dict[str, Any]]) -> list[Message]:
    """The turns of a LLaVA training record: ``[{"from": "human" | "gpt", "value": text}, ...]`` (spec section 8).

    `<video>` becomes `<image>`; a user's only placeholder moves to the start of its turn, followed by a newline; a leading
    gpt turn is dropped. Several placeholders in one turn (ours; the published code merges them into one) stay where they
    are, since the text around them says which is which.

    Raises:
      UserError: no turn is left, or a turn has an unknown "from" or no text.
    """
    messages = []
    for number, turn in enumerate(conversations, 1):
        fields = turn if isinstance(turn, dict) else {}
        role, value = _LLAVA_ROLES.get(str(fields.get("from"))), fields.get("value")
        if role is None or not isinstance(value, str):
            raise UserError(
                f'turn {number} of a conversation is {turn!r:.200}: expected {{"from": "human" or "gpt", "value": text}}'
            )
        messages.append(Message(role, _placeholder_first(value) if role == "user" else value))
    if messages and messages[0].role == "assistant":
        messages = messages[1:]
    if not messages:
        raise UserError("a conversation has no human turn: expected at least one")
    return messages


def _placeholder_first(text: str) -> str:
    text = text.replace(VIDEO, IMAGE)
    if text.count(IMAGE) != 1:
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def with_placeholders(question: str, images: int) -> str:
    """A question with one `<image>` for each of its images (a video counts as one).

    A question without any gets them in front, each followed by a newline; one with placeholders keeps them where they are.

    Raises:
      UserError: the question has placeholders, but not as many as there are images.
    """
    question = question.replace(VIDEO, IMAGE)
    written = question.count(IMAGE)
    if written == 0:
        return f"{IMAGE}\n" * images + question
    if written != images:
        raise UserError(
            f"the question has {written} {IMAGE} placeholder(s) but {images} image(s) or video(s) were given: "
            "write one placeholder for each, or none at all"
        )
    return question


def video_place(question: str, images: int, videos: int) -> int:
    """Where a question's video comes among its media: where `<video>` stands, else after its `images` pictures.

    Raises:
      UserError: more `<video>` placeholders than `videos` (0 or 1).
    """
    before, found, _ = question.partition(VIDEO)
    if question.count(VIDEO) > videos:
        raise UserError(f"the question has {question.count(VIDEO)} {VIDEO} placeholder(s) but {videos} video(s) were given")
    return before.count(IMAGE) if found else images


def count_placeholders(messages: Sequence[Message]) -> int:
    """Images (or videos) that the messages ask for: every `<image>` in a user's turn."""
    return sum(m.content.count(IMAGE) for m in messages if m.role == "user")


def render(messages: Sequence[Message], template: str, tokenizer: Tokenizer, *, generate: bool) -> list[Span]:
    """Put messages into a prompt template (one of ``config.TEMPLATES``; spec section 8).

    With `generate` the prompt ends where an answer starts, and control tokens that people typed, such as `</s>`, are
    plain text, so that nobody can forge a turn. Without it (training) they are control tokens, as in the published code.
    `llava_llama_3_1_two_bos` has the published code's second BOS, which that code feeds when generating only.

    Raises:
      UserError: unknown template; turns that do not alternate from a user's on, or (generate) do not end with one; a
        LLaMA-3.1 template with a tokenizer that has no chat template of that kind; a `plain` prompt that is not one caption.
    """
    if template not in TEMPLATES:
        raise UserError(f"there is no prompt template {template!r}: choose one of {', '.join(TEMPLATES)}")
    _check_turns(messages, generate)
    if template == "plain":
        return _plain(messages, generate)
    if template in _VICUNA_PERSON:
        return _vicuna(messages, _VICUNA_PERSON[template], generate)
    spans = _llama(messages, tokenizer, template, generate)
    if template == _LLAMA_TWO_BOS and generate:
        spans.insert(0, Span(tokenizer.bos_token or ""))
    return spans


def _check_turns(messages: Sequence[Message], generate: bool) -> None:
    roles = [m.role for m in messages]
    expected = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if not roles or roles != expected:
        raise UserError(f"the turns of a conversation are {roles}: expected user and assistant in turn, a user's first")
    if generate and roles[-1] != "user":
        raise UserError("the conversation ends with an answer: to generate one it must end with a user's turn")


def _content(message: Message, text: str, generate: bool) -> Span:
    answer = message.role == "assistant"
    return Span(text, is_answer=answer, has_placeholders=not answer, is_literal=generate)


def _plain(messages: Sequence[Message], generate: bool) -> list[Span]:
    images = count_placeholders(messages)
    if len(messages) > 2 or images == 0:
        raise UserError(
            f"the prompt template 'plain' is for one caption of one picture: expected one turn with {IMAGE} and at most one "
            f"answer, got {len(messages)} turns with {images} placeholders"
        )
    spans = [Span(IMAGE * images, has_placeholders=True)]  # the words of the user's turn are not part of the prompt
    for answer in messages[1:]:
        spans += [_content(answer, answer.content, generate), Span("\n", is_answer=True)]
    return spans


def _vicuna(messages: Sequence[Message], person: str, generate: bool) -> list[Span]:
    spans = [Span(_VICUNA_SYSTEM.format(person))]
    for message in messages:
        content = _content(message, message.content, generate)
        if message.role == "user":
            spans += [Span("USER: "), content, Span(" ")]
        else:
            spans += [Span("ASSISTANT:"), Span(" ", is_answer=True), content, Span(_VICUNA_END, is_answer=True)]
    return [*spans, Span("ASSISTANT:")] if generate else spans


def _llama(messages: Sequence[Message], tokenizer: Tokenizer, template: str, generate: bool) -> list[Span]:
    if not tokenizer.chat_template:
        raise UserError(
            f"the prompt template {template!r} needs a tokenizer with a chat template, and the one in {tokenizer.folder} has "
            "none: copy the checkpoint's tokenizer_config.json (and chat_template.jinja) there, or choose another template"
        )
    # A marker stands for each content while the chat template runs, so that nothing in a content can be mistaken for the
    # template's own text. The tabs show whether the template trims contents (LLaMA's does).
    marker = "\t\ue000\t"
    turns = [{"role": "system", "content": _LLAMA_SYSTEM}, *({"role": m.role, "content": marker} for m in messages)]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=generate)
    trims = marker not in text
    first, *parts = text.split(marker.strip() if trims else marker)
    answers = zip(messages, parts)
    if len(parts) != len(messages) or any(m.role == "assistant" and not after.startswith(_LLAMA_END) for m, after in answers):
        raise UserError(
            f"the chat template of the tokenizer in {tokenizer.folder} is not of LLaMA-3.1's kind (every turn once and in "
            f"order, answers ending in {_LLAMA_END}): choose another prompt template than {template!r}"
        )
    spans = [Span(first)]
    for message, after in zip(messages, parts):
        spans.append(_content(message, message.content.strip() if trims else message.content, generate))
        if message.role == "assistant":
            spans.append(Span(_LLAMA_END, is_answer=True))
            after = after.removeprefix(_LLAMA_END)
        spans.append(Span(after))
    if generate and not text.endswith(_LLAMA_HEADER):
        spans.append(Span(_LLAMA_HEADER))
    return spans

"""Questions about pictures and videos in, answers out: the one door for the command line, evaluation and serving.

Axis letters: B rows, P tiles per image, F frames, H,W pixels, T text tokens, T′ decoder positions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lmm_jax.config import TEMPLATES, ModelConfig
from lmm_jax.data.conversation import Message, render, video_place, with_placeholders
from lmm_jax.data.frames import FrameFolder
from lmm_jax.data.image import load_image, preprocess
from lmm_jax.data.tokenize import Tokenizer, stop_token_ids
from lmm_jax.data.video import FrameStream, stream_frames
from lmm_jax.errors import UserError
from lmm_jax.inference import arrays
from lmm_jax.inference.engine import MAX_BATCH, Engine, Request
from lmm_jax.inference.images import Medium
from lmm_jax.inference.sampling import Sampling
from lmm_jax.inference.words import Words

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray  # an array: what `Assistant.read_picture` gives
Frames = list[np.ndarray]  # what `Assistant.read_video` gives


@dataclasses.dataclass(frozen=True)
class Video:
    """A video file, or a part of it.

    Attributes:
      path: of the file, or of a folder of pictures, which are then all its frames.
      start, end: seconds; None is the beginning or the end.
      fps: frames taken per second.
      most: frames taken at most, spread over the video; None: any number. Of a folder all are taken.
    """

    path: str | os.PathLike
    start: float | None = None
    end: float | None = None
    fps: float = 1.0
    most: int | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """A question on its own; its images come first in the prompt, then its video, unless the text has `<image>` for each."""

    text: str
    images: Sequence[Picture] = ()
    video: Video | str | os.PathLike | Frames | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns so far.

    Attributes:
      messages: user and assistant in turn.
      media: what the `<image>` placeholders stand for, in order: pixels (P,H,W,3) uint8, a Video, or its frames.
    """

    messages: tuple[Message, ...] = ()
    media: tuple[np.ndarray | Video | Frames, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
      text: without end token, stripped.
      token_ids: with it.
      finish_reason: "stop" (an end token) or "length" (max_new_tokens, or the model's context).
    """

    text: str
    token_ids: list[int]
    finish_reason: str


class Assistant:
    """A loaded model. `lmm_jax.load` makes one."""

    def __init__(self, folder: Path, config: ModelConfig, engine: Engine) -> None:
        """Reads the tokenizer when the first question comes."""
        self.folder, self.config, self.engine = folder, config, engine

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model folder's tokenizer. Raises UserError where it has none."""
        return Tokenizer.load(self.folder)

    # ---- questions ------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        images: Sequence[Picture] = (),
        video: Video | str | os.PathLike | None = None,
        *,
        template: str | None = None,
        **sampling: Any,
    ) -> str:
        """The answer to one question.

        Args:
          question: may have one `<image>` for each image and a `<video>`; without any, images come first, then the video.
          images: paths, file contents or Pillow images; EXIF rotation is applied.
          video: a path or a `Video`.
          template: one of `config.TEMPLATES`; None is the model's own.
          **sampling: fields of `Sampling` (max_new_tokens, temperature, top_p, top_k, seed).

        Raises:
          UserError: media that cannot be read, a prompt longer than the model's context, a model without tokenizer.
        """
        return self.ask_batch([Question(question, images, video)], template=template, **sampling)[0]

    def ask_batch(self, questions: Sequence[Question | str], *, template: str | None = None, **sampling: Any) -> list[str]:
        """Answers to many questions at once, each the same as if asked alone; see `ask`."""
        if isinstance(questions, str):
            raise TypeError("ask_batch takes a list of questions: for one there is ask")
        asked = [self.extend(Conversation(), Question(q) if isinstance(q, str) else q) for q in questions]
        return [answer.text for answer in self.answers(asked, template=template, **sampling)]

    def stream(
        self,
        question: str,
        images: Sequence[Picture] = (),
        video: Video | str | os.PathLike | None = None,
        *,
        template: str | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer to one question in pieces, as it is generated; see `ask`."""
        asked = self.extend(Conversation(), Question(question, images, video))
        return self.stream_answer(asked, template=template, **sampling)

    def chat(self, template: str | None = None) -> Chat:
        """A conversation of several turns."""
        return Chat(self, template)

    def extend(self, conversation: Conversation, question: Question) -> Conversation:
        """The conversation with one more question, its pictures read and preprocessed.

        Raises:
          UserError: a picture that cannot be read, or placeholders that do not match the media.
        """
        one = isinstance(question.images, Picture)
        media: list[np.ndarray | Video | Frames]
        media = [self.read_picture(p) for p in ([question.images] if one else question.images or ())]
        has_video = question.video is not None
        place = video_place(question.text, len(media), int(has_video))
        if has_video:
            media.insert(place, question.video if isinstance(question.video, Video | list) else Video(question.video))
        message = Message("user", with_placeholders(question.text, len(media)))
        return Conversation((*conversation.messages, message), (*conversation.media, *media))

    def read_picture(self, picture: Picture) -> np.ndarray:
        """Pixels as the model takes them, (P,H,W,3) uint8, to be given in place of the picture as often as wanted.

        Raises:
          UserError: it cannot be read.
        """
        return picture if isinstance(picture, np.ndarray) else self._pixels(load_image(picture, upright=True))

    def read_video(self, video: Video, fits: Callable[[int], bool] = lambda _: True) -> Video | Frames:
        """Frames as the model takes them, each (P,H,W,3) uint8, to be given in place of the video as often as wanted.

        Args:
          video: its file is read to the end.
          fits: is asked once whether so many bytes may be kept; where not, the video comes back.

        Raises:
          UserError: it cannot be read.
        """
        with contextlib.ExitStack() as stack:
            stream = self._open(video, stack)
            frames = iter(stream)
            first = next(frames)
            return [first, *frames] if fits(first.nbytes * len(stream)) else video

    def answers(self, conversations: Sequence[Conversation], *, template: str | None = None, **sampling: Any) -> list[Answer]:
        """Answers to conversations that end with a question; arguments as for `ask`."""
        done = dict(self.answers_as_completed(conversations, template=template, **sampling))
        return [done[i] for i in range(len(conversations))]

    def answers_as_completed(
        self,
        conversations: Sequence[Conversation],
        *,
        template: str | None = None,
        batch_size: int = MAX_BATCH,
        **sampling: Any,
    ) -> Iterator[tuple[int, Answer]]:
        """As `answers`: (number of the conversation, its answer) as they are done, at most `batch_size` at once.

        Give many at a time: those of like length share a batch, and a picture of several is encoded once.
        """
        settings, stop = _sampling(sampling), self.stop_ids(template)
        with contextlib.ExitStack() as stack:
            requests = [self.request(c, template, settings, stack) for c in conversations]
            for i, ids in self.engine.as_completed(requests, stop, batch_size):
                yield i, self._answer(ids, stop)

    def stream_answer(self, conversation: Conversation, *, template: str | None = None, **sampling: Any) -> Iterator[str]:
        """The answer to a conversation that ends with a question, in pieces; their sum is the answer's text."""
        settings, stop = _sampling(sampling), self.stop_ids(template)
        words = Words(self.tokenizer, stop)
        with contextlib.ExitStack() as stack:
            request = self.request(conversation, template, settings, stack)
            for token in self.engine.stream(request, stop):
                if piece := words.push([token]):
                    yield piece
        if rest := words.flush():
            yield rest

    # ---- what the engine takes --------------------------------------------------------------------------------------

    def stop_ids(self, template: str | None) -> tuple[int, ...]:
        """Token ids that end an answer."""
        return stop_token_ids(self.tokenizer, template or self.config.template, self.config.eos_token_ids)

    def request(
        self, conversation: Conversation, template: str | None, sampling: Sampling, stack: contextlib.ExitStack
    ) -> Request:
        """A conversation that ends with a question, for the engine; `stack` closes its videos."""
        spans = render(conversation.messages, template or self.config.template, self.tokenizer, generate=True)
        ids, _ = self.tokenizer.encode(spans)
        return Request(ids, [self._open(m, stack) for m in conversation.media], sampling)

    # ---- numbers to check against other implementations -----------------------------------------------------------

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, pixel_values: np.ndarray | None = None
    ) -> np.ndarray:
        """Next-token logits at every decoder position.

        Args:
          input_ids: (B,T) int; IMAGE_TOKEN_ID (−200) is a row's image or video.
          attention_mask: (B,T), 0 on padding; None: no padding.
          pixel_values: (B,P,3,H,W) normalised float32, or a video per row (B,F,P,3,H,W).

        Returns:
          (B,T′,vocab) float32, T′ = T − 1 + vision tokens; zeros past a row's end.
        """
        rows, media = arrays.rows(self.config, input_ids, attention_mask, pixel_values)
        got, layout = self.engine.logits(rows, media)
        out = np.zeros((len(rows), arrays.padded_length(self.config, input_ids, rows), got.shape[-1]), np.float32)
        for b, n in enumerate(layout.lengths[: len(rows)]):
            out[b, :n] = got[b, :n]
        return out

    def loss(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        labels: np.ndarray,
        pixel_values: np.ndarray | None = None,
    ) -> float:
        """Mean next-token cross-entropy in nats over `labels` (B,T) that are not −100; those positions are not fused."""
        rows, media = arrays.rows(self.config, input_ids, attention_mask, pixel_values, labels)
        total, count = self.engine.loss(rows, media)
        if not count:
            raise UserError("labels are all -100: there is nothing to predict")
        return total / count

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        pixel_values: np.ndarray | None = None,
        max_new_tokens: int = 512,
        **sampling: Any,
    ) -> np.ndarray:
        """New tokens (B,max_new_tokens) int32, −1 after the checkpoint's end token; arguments as for `logits`."""
        rows, media = arrays.rows(self.config, input_ids, attention_mask, pixel_values)
        settings = _sampling({"max_new_tokens": max_new_tokens, **sampling})
        requests = [Request(r.ids, m, settings) for r, m in zip(rows, media)]
        out = np.full((len(rows), max_new_tokens), -1, np.int32)
        for b, tokens in enumerate(self.engine.generate(requests, self.config.eos_token_ids)):
            out[b, : len(tokens)] = tokens
        return out

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _open(self, medium: np.ndarray | Video | Frames, stack: contextlib.ExitStack) -> Medium:
        if not isinstance(medium, Video):
            return medium
        return _Stream(lambda: stack.enter_context(self._frames(medium)), self._pixels)

    def _frames(self, video: Video) -> FrameStream | FrameFolder:
        size = self.config.vision.image_size
        if not os.path.isdir(video.path):
            return stream_frames(video.path, size=size, fps=video.fps, start=video.start, end=video.end, most=video.most)
        if (video.start, video.end, video.fps) != (None, None, 1.0):
            raise UserError(f"{video.path} is a folder of frames, all of which are taken: leave out start, end and fps")
        return FrameFolder(video.path)

    def _pixels(self, picture: Image.Image) -> np.ndarray:
        c = self.config
        return preprocess(
            picture, size=c.vision.image_size, aspect_ratio=c.image_aspect_ratio, resolution_ratio=c.resolution_ratio
        )

    def _answer(self, ids: list[int], stop: Sequence[int]) -> Answer:
        ended = bool(ids) and ids[-1] in stop
        return Answer(self.tokenizer.decode(ids[:-1] if ended else ids).strip(), ids, "stop" if ended else "length")


class Chat:
    """A conversation going on. Each answer is the same as if the whole transcript were asked afresh.

    Attributes:
      conversation: turns so far.
    """

    def __init__(self, assistant: Assistant, template: str | None = None) -> None:
        """Starts empty; `template` as for `Assistant.ask`."""
        self._assistant, self._template = assistant, template
        if template is not None and template not in TEMPLATES:
            raise UserError(f"there is no prompt template {template!r}: choose one of {', '.join(TEMPLATES)}")
        self.conversation = Conversation()

    def ask(
        self,
        question: str,
        images: Sequence[Picture] = (),
        video: Video | str | os.PathLike | None = None,
        **sampling: Any,
    ) -> str:
        """The next answer; arguments as for `Assistant.ask`. A question that fails leaves the conversation as it was."""
        return "".join(self.stream(question, images, video, **sampling))

    def stream(
        self,
        question: str,
        images: Sequence[Picture] = (),
        video: Video | str | os.PathLike | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The next answer in pieces. The turn becomes part of the conversation when its last piece was taken."""
        asked = self._assistant.extend(self.conversation, Question(question, images, video))
        pieces = []
        for piece in self._assistant.stream_answer(asked, template=self._template, **sampling):
            pieces.append(piece)
            yield piece
        answer = Message("assistant", "".join(pieces))
        self.conversation = Conversation((*asked.messages, answer), asked.media)


class _Stream:
    """Frames of a video as the engine takes them: sized, each (P,H,W,3) uint8. Wanted again, it is read again."""

    def __init__(self, read: Callable[[], FrameStream | FrameFolder], pixels: Callable[[Image.Image], np.ndarray]) -> None:
        self._read, self._pixels = read, pixels
        self._frames: FrameStream | FrameFolder | None = read()
        self._length = len(self._frames)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[np.ndarray]:
        frames, self._frames = self._frames or self._read(), None
        return (self._pixels(Image.fromarray(frame)) for frame in frames)


def _sampling(fields: dict[str, Any]) -> Sampling:
    unknown = set(fields) - {f.name for f in dataclasses.fields(Sampling)}
    if unknown:
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")
    return Sampling(**fields)

"""Questions in, answers out, piece by piece: what the API and the page share."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lmm_jax.data.conversation import Message, with_placeholders
from lmm_jax.errors import DeadlineError, UserError
from lmm_jax.inference.assistant import Assistant, Conversation
from lmm_jax.inference.engine import Request
from lmm_jax.inference.live import Live
from lmm_jax.inference.sampling import Sampling
from lmm_jax.inference.tickets import Began, Event, Tokens
from lmm_jax.inference.words import Words
from lmm_jax.serve.decoding import Decoders
from lmm_jax.serve.errors import ApiError, as_api_error
from lmm_jax.serve.fetching import is_public
from lmm_jax.serve.files import FileStore
from lmm_jax.serve.limits import Limits
from lmm_jax.serve.media import MediaReader
from lmm_jax.serve.metrics import Metrics

log = logging.getLogger("uvicorn.error")  # which its users see
NEW_TOKENS = 512  # where a client does not say how many
_GRACE_SECONDS = 1.0  # for the engine to say first that it is too late
_WARM_SECONDS = 3600.0  # large models take long to compile
_CHARACTERS = 64  # of a token at most, so that a text that is far too long is not tokenised


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a client wants its answers.

    Attributes:
      sampling: of the first answer; the others have the following seeds.
      stops: texts that end an answer.
      count: answers.
      seconds: until the last token, from now.
    """

    sampling: Sampling
    stops: Sequence[str] = ()
    count: int = 1
    seconds: float = 300.0


class Reply:
    """One answer as it comes.

    Attributes:
      finish_reason: "stop" or "length", once all pieces came.
      tokens: generated.
      waited, encode: seconds, see `tickets.Began`.
      first_token, total: seconds since the request was made.
    """

    def __init__(self, words: Words, metrics: Metrics, seconds: float, log: Callable[[str], None]) -> None:
        """Made by `Service.replies`, from inside an event loop; `log` takes the whole text."""
        self._until, self._log = asyncio.get_running_loop().time() + seconds + _GRACE_SECONDS, log
        self._words, self._metrics, self._loop = words, metrics, asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._start = time.monotonic()
        self.cancel: Callable[[], None] = lambda: None
        self.finish_reason = "length"
        self.tokens = 0
        self.waited = self.encode = self.first_token = self.total = 0.0

    def tell(self, event: Event) -> None:
        """Takes an event from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def pieces(self) -> AsyncIterator[str]:
        """The text; who stops listening ends the answer. Raises ApiError."""
        text, has_left = [], True
        try:
            while not self._words.is_stopped:
                event = await self._next()
                self.total = time.monotonic() - self._start
                if isinstance(event, Began):
                    self.waited, self.encode = event.waited, event.encode_seconds
                elif isinstance(event, Tokens):
                    self.first_token = self.first_token or self.total
                    self.tokens += len(event.ids)
                    if piece := self._words.push(event.ids):
                        text.append(piece)
                        yield piece
                elif event.error:
                    has_left = False
                    raise as_api_error(event.error)
                else:
                    break
            self.finish_reason = "stop" if self._words.is_stopped else "length"
            if piece := self._words.flush():
                text.append(piece)
                yield piece
            has_left = False
            self._log("".join(text))
            self._metrics.first_token.observe(self.first_token)
            self._metrics.answer.observe(self.total)
        finally:
            self.cancel()
            self._metrics.tokens.inc(self.tokens)
            self._metrics.cancelled.inc(has_left)

    async def _next(self) -> Event:
        """A deadline holds even while the engine's thread is busy, with compiling perhaps."""
        try:
            async with asyncio.timeout_at(self._until):
                return await self._events.get()
        except TimeoutError:
            raise as_api_error(DeadlineError()) from None


class Service:
    """A model and all that is around it.

    Attributes:
      name: of the model.
      limits: of clients.
      folder: for what is on the disk meanwhile.
      media: reads what clients send.
      metrics: of this server.
    """

    def __init__(
        self,
        assistant: Assistant,
        limits: Limits,
        folder: Path,
        *,
        name: str,
        template: str | None = None,
        allows_remote: bool = False,
        logs_prompts: bool = False,
        allows_address: Callable[[str], bool] = is_public,
    ) -> None:
        """Starts the engine's thread.

        Args:
          assistant: the model, which nobody else may use from now on.
          limits: of clients.
          folder: for what is on the disk meanwhile; there already, and emptied by whoever made it.
          name: of the model, as clients see it.
          template: of prompts; None is the model's own.
          allows_remote: whether pictures and videos are fetched from other servers.
          logs_prompts: whether what is asked and answered goes to the log.
          allows_address: which servers may be fetched from, see `fetching.is_public`.

        Raises:
          UserError: the model has no tokenizer.
        """
        self.assistant, self.limits, self.folder, self.name = assistant, limits, folder, name
        self._template, self._logs_prompts = template, logs_prompts
        self.created = int(time.time())
        self.metrics = Metrics()
        self._stop_ids = assistant.stop_ids(template)
        uploads, reading = folder / "uploads", folder / "reading"
        uploads.mkdir()
        reading.mkdir()
        self.decoders = Decoders(assistant.config, limits)
        store = FileStore(uploads, limits)
        self.media = MediaReader(self.decoders, store, reading, limits, allows_remote, allows_address)
        self.live = Live(assistant.engine, self._stop_ids, rows=limits.rows)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # one at a time: tokenizers are not made for several threads
        self.metrics.running.set_function(lambda: self.live.running)
        self.metrics.waiting.set_function(lambda: self.live.waiting)
        self.metrics.files.set_function(lambda: len(store.all()))

    async def prompt(self, conversation: Conversation) -> Request:
        """What the engine takes. Raises UserError for a prompt that is too long or turns that are out of order."""
        characters, most = sum(len(m.content) for m in conversation.messages), self.limits.prompt_tokens
        if characters > _CHARACTERS * most:
            raise _too_long(f"{characters} characters", most)
        self._log("asked: " + " | ".join(f"{m.role}: {m.content}" for m in conversation.messages))
        loop = asyncio.get_running_loop()
        request = await loop.run_in_executor(
            self._tokenizing,
            lambda: self.assistant.request(conversation, self._template, Sampling(), contextlib.ExitStack()),
        )
        try:
            length, _ = self.assistant.engine.measure(request)
        except UserError as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param="messages") from error
        if length > most:
            raise _too_long(f"{length} positions", most)
        return request

    def length(self, prompt: Request) -> int:
        """Positions of a prompt."""
        return self.assistant.engine.measure(prompt)[0]

    def replies(self, prompt: Request, wanted: Wanted) -> list[Reply]:
        """Begins to answer. Raises UserError when the server is about to stop."""
        replies = []
        self.metrics.prompt_tokens.inc(self.length(prompt))
        for number in range(wanted.count):
            end_ids = () if wanted.sampling.ignore_eos else self._stop_ids
            words = Words(self.assistant.tokenizer, end_ids, wanted.stops)
            reply = Reply(words, self.metrics, wanted.seconds, lambda text: self._log(f"answered: {text}"))
            sampling = dataclasses.replace(wanted.sampling, seed=(wanted.sampling.seed + number) % 2**31)
            ticket = self.live.submit(dataclasses.replace(prompt, sampling=sampling), reply.tell, wanted.seconds)
            reply.cancel = ticket.cancel
            replies.append(reply)
        return replies

    def _log(self, text: str) -> None:
        if self._logs_prompts:
            log.info(text)

    async def warm_up(self) -> None:
        """Answers once, about a black picture: returns when the model and the decoders work. Raises UserError where not."""
        await self.decoders.start()
        shape = (self.assistant.config.tiles, *2 * [self.assistant.config.vision.image_size], 3)
        asked = Conversation((Message("user", with_placeholders("Hello.", 1)),), (np.zeros(shape, np.uint8),))
        (reply,) = self.replies(await self.prompt(asked), Wanted(Sampling(max_new_tokens=2), seconds=_WARM_SECONDS))
        async for _ in reply.pieces():
            pass

    def close(self, seconds: float) -> None:
        """Finishes what runs, for so many seconds, and ends."""
        if not self.live.close(timeout=seconds):
            self.live.close(finish=False, timeout=10)
        self.decoders.close()
        self._tokenizing.shutdown(wait=False)


def random_seed() -> int:
    """For a client that gives none."""
    return secrets.randbelow(2**31)


def _too_long(what: str, most: int) -> ApiError:
    return ApiError(
        400, f"the prompt takes {what}, at most {most} positions are taken", code="context_length_exceeded", param="messages"
    )

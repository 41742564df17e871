"""Requests on their way through the live engine, and what is told of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from lmm_jax.errors import DeadlineError, UserError
from lmm_jax.inference.buckets import length_bucket
from lmm_jax.inference.engine import Request


@dataclasses.dataclass(frozen=True)
class Began:
    """The request has a slot: `encode_seconds` is what its pictures and its prompt took, `waited` seconds came before."""

    waited: float
    encode_seconds: float


@dataclasses.dataclass(frozen=True)
class Tokens:
    """New tokens, the end token included."""

    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Ended:
    """Nothing more comes: all tokens were told, or there was an error."""

    error: UserError | None = None


Event = Began | Tokens | Ended


class Ticket:
    """A request on its way."""

    def __init__(self, request: Request, tell: Callable[[Event], None], size: tuple[int, int], seconds: float | None) -> None:
        """Made by `Live.submit`."""
        self.request, self._tell, (self.length, self.limit) = request, tell, size
        self.submitted = time.monotonic()
        self._deadline = None if seconds is None else self.submitted + seconds
        self.is_cancelled = False
        self.passed = 0
        self.seen = 0  # tokens told
        self.has_ended = False

    @property
    def positions(self) -> int:
        """Of a slot that holds the prompt, padded, and the answer."""
        return max(length_bucket(self.length), self.length + self.limit)

    @property
    def images(self) -> int:
        """Pictures and frames."""
        return sum(self.request.row().images)

    def cancel(self) -> None:
        """Nobody wants the answer any more: its slot is free at the next turn. May be called from any thread."""
        self.is_cancelled = True

    def is_over(self) -> bool:
        """Whether it was cancelled or is too late."""
        return self.is_cancelled or (self._deadline is not None and time.monotonic() > self._deadline)

    def tell(self, tokens: Sequence[int]) -> None:
        """Those of all its tokens so far that were not told yet."""
        if new := list(tokens[self.seen :]):
            self.seen = len(tokens)
            self._tell(Tokens(new))

    def begin(self, encode_seconds: float) -> None:
        """It has a slot."""
        self._tell(Began(time.monotonic() - self.submitted - encode_seconds, encode_seconds))

    def end(self, error: UserError | None = None) -> None:
        """Tells that nothing more comes, once."""
        if not self.has_ended:
            self.has_ended = True
            self._tell(Ended(error))

    def end_early(self) -> None:
        """The same where it `is_over`."""
        self.end(None if self.is_cancelled else DeadlineError())

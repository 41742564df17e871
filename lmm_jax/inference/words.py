"""Tokens of an answer -> its text, piece by piece, up to a stop text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lmm_jax.data.tokenize import StreamDecoder, Tokenizer


class Words:
    """All pieces together are the answer's text, stripped, as `Assistant.answers` gives it.

    Attributes:
      is_stopped: a stop text or an end token came.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int], stops: Sequence[str] = ()) -> None:
        """`stops` are texts that end the answer and are not part of it."""
        self._decoder, self._end_ids, self._stops = StreamDecoder(tokenizer), end_ids, stops
        self._held, self._is_blank, self._is_cut = "", True, False
        self.is_stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain with these tokens: what may become a stop text or the end's white space is held back."""
        new = ""
        for token in ids:
            if token in self._end_ids:
                self.is_stopped = True
                break
            new += self._decoder.push(token)
        return self._take(new)

    def flush(self) -> str:
        """What is left at the end."""
        piece = self._take(self._decoder.flush())
        rest, self._held = self._held, ""
        return (piece + rest).rstrip()

    def _take(self, new: str) -> str:
        if self._is_cut:
            return ""
        held = self._held + new
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            held, self._held = held[: min(found)].rstrip(), ""
            self._is_cut = self.is_stopped = True
            return held.lstrip() if self._is_blank else held
        if self._is_blank:
            held = held.lstrip()
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        certain = held[: len(held) - keep].rstrip()
        self._held = held[len(certain) :]
        self._is_blank = self._is_blank and not certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

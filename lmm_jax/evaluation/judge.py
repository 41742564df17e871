"""Asks an LLM to judge answers, through any endpoint that speaks OpenAI's chat completions, and keeps every reply.

    scorer ─► Judge.ask ─► a reply kept on disk
                       └─► Endpoint: one POST, repeated while that may help ─► kept on disk

What a reply says is read in `verdicts`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import email.utils
import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from lmm_jax.errors import UserError

OPENAI = "https://api.openai.com/v1"
LONGEST_REPLY = 1 << 24  # bytes of one HTTP reply
LONGEST_WAIT = 600.0  # seconds an endpoint may ask to wait; beyond, the question is given up
OUTAGES = 5  # questions given up in a row, for want of any answer, after which nothing more is asked

Message = dict[str, str]  # role and content
T = TypeVar("T")
Item = TypeVar("Item")


class JudgeError(UserError):
    """One question got no reply; others may."""


class TryAgainError(Exception):
    """A request failed and may succeed if repeated."""

    def __init__(self, reason: str, after: float | None = None, outage: bool = True) -> None:
        """A sentence's end; seconds to wait, where the endpoint says; whether nothing usable came at all."""
        super().__init__(reason)
        self.after, self.outage = after, outage


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an LLM said; which model it says it is ("" if it does not), and the tokens it read and wrote."""

    text: str
    served: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Usage:
    """What judging took so far.

    Attributes:
      calls: requests sent, repeated ones too.
      cached: questions whose reply was on disk.
      failures: requests that failed, repeated or not.
      prompt_tokens, completion_tokens: as the endpoint counts them, of this time's calls.
      cost: of these, in the currency of the prices.
    """

    calls: int = 0
    cached: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Endpoint:
    """POST {base}/chat/completions, once; redirections are not followed, so the key goes nowhere else."""

    def __init__(self, base: str = OPENAI, *, key_variable: str = "OPENAI_API_KEY", timeout: float = 120.0) -> None:
        """Takes the key from an environment variable; without one none is sent.

        Raises:
          UserError: no address of HTTP, one with a name and password in it, or a key that cannot be a header.
        """
        if not _is_address(base):
            raise UserError(
                f"the judge's address must be like {OPENAI}, without password or query; the key comes from a variable"
            )
        self.base, self.key_variable, self.timeout = base.rstrip("/"), key_variable, timeout
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{key_variable} holds characters that no key has: set it again")
        self._opener = urllib.request.build_opener(_NoRedirection)

    def __call__(self, request: dict[str, Any]) -> Reply:
        """One reply.

        Raises:
          TryAgainError: it may come if asked again.
          JudgeError: it will not.
          UserError: none will come to anything that is asked.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = json.dumps(request).encode()
        post = urllib.request.Request(f"{self.base}/chat/completions", data, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(post, timeout=self.timeout) as response:
                return _reply(_read(response, deadline))
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, UnicodeError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise TryAgainError(self._without_key(f"it cannot be reached: {error or type(error).__name__}")) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        with error:
            try:
                said = error.read(2000).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                said = ""
        what = self._without_key(f"HTTP {error.code}: {' '.join(said.split())[:300]}")
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            return TryAgainError(what, _retry_after(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            key = "was refused" if self._key else "is not set"
            return UserError(f"the judge at {self.base} wants a key, and that in {self.key_variable} {key} ({what})")
        if error.code == 404 or error.code < 400:
            return UserError(f"there is no judge at {self.base}, or no such model: check both ({what})")
        return JudgeError(f"the judge at {self.base} refused a question ({what})")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "(key)") if self._key else text


def _is_address(base: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(base)
        extra = "@" in parts.netloc or parts.query or parts.fragment or parts.port == 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not extra


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body; the timeout of the socket is for each piece, so a trickle needs a deadline."""
    body = bytearray()
    while piece := response.read1(1 << 16):
        body += piece
        if time.monotonic() > deadline:
            raise TimeoutError("its reply came too slowly")
        if len(body) > LONGEST_REPLY:
            raise TryAgainError("its reply does not end", outage=False)
    return bytes(body)


def _reply(body: bytes) -> Reply:
    try:
        answer = json.loads(body)
        text = answer["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError(f"its content is {text!r:.40}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise TryAgainError(f"its reply has not the form of a chat completion: {error!r:.200}", outage=False) from None
    used = answer.get("usage")
    tokens = [used.get(f"{kind}_tokens") if isinstance(used, dict) else 0 for kind in ("prompt", "completion")]
    return Reply(text, str(answer.get("model") or ""), *(n if isinstance(n, int) else 0 for n in tokens))


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date; None where there is neither."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        pass
    try:
        then = email.utils.parsedate_to_datetime(value or "")
        return max(0.0, (then - datetime.datetime.now(then.tzinfo)).total_seconds())
    except (ValueError, TypeError):
        return None


class Judge:
    """An LLM that judges: many questions at once, each asked once and for all.

    Attributes:
      model: its name at the endpoint.
      url: of the endpoint.
      runs: how often LLaVA-Bench and MM-Vet are judged; the published figures are means of 3 (evaluation spec 4.11, 4.12).
      served: what the endpoint calls the models that replied.
      usage: so far.
    """

    def __init__(
        self,
        model: str,
        complete: Callable[[dict[str, Any]], Reply],
        cache: Path,
        *,
        url: str = "",
        runs: int = 1,
        workers: int = 8,
        retries: int = 5,
        backoff: float = 1.0,
        prices: tuple[float, float] = (0.0, 0.0),
        watch: Callable[[Usage], None] | None = None,
    ) -> None:
        """Reads the replies so far.

        Args:
          model: sent with every request.
          complete: an `Endpoint`, or any function from a request (model, messages and, where they are set, temperature and
            max_tokens) to a reply; may raise as an Endpoint does.
          cache: file of JSON lines to which replies are appended; made if it is not there.
          url: where the model is; a reply of one place is never taken for that of another.
          runs: see the class.
          workers: questions at once.
          retries: times a failed request is repeated.
          backoff: seconds before the first repetition, doubled with each, at most 60; an endpoint's Retry-After goes first.
          prices: of a million prompt tokens and a million completion tokens.
          watch: is told of every change of `usage`, from one thread at a time.

        Raises:
          UserError: the file cannot be read; a number out of range.
        """
        if not model or runs < 1 or workers < 1 or retries < 0 or backoff < 0 or min(prices) < 0:
            raise UserError("a judge needs a model's name, at least one run and one worker, and no negative number")
        self.model, self.url, self.runs, self.usage = model, url, runs, Usage()
        self.served: set[str] = set()
        self._complete, self._cache, self._watch = complete, _Cache(cache), watch
        self._workers, self._retries, self._backoff, self._prices = workers, retries, backoff, prices
        self._lock, self._stop, self._outages = threading.RLock(), threading.Event(), 0

    def ask(
        self, messages: list[Message], *, temperature: float | None = None, max_tokens: int | None = None, attempt: int = 0
    ) -> str:
        """The reply to some messages, from disk where they were asked before.

        Args:
          messages: with roles system and user.
          temperature, max_tokens: None leaves them to the endpoint.
          attempt: asking again with another number gives another reply.

        Raises:
          JudgeError: there is none to these messages.
          UserError: there will be none to any.
        """
        asked = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        about = asked | {"attempt": attempt} | ({"url": self.url} if self.url else {})
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        kept = self._cache.get(key)
        if kept:
            self._count(cached=1)
        else:
            reply = self._insist({name: value for name, value in asked.items() if value is not None})
            kept = self._cache.keep(key, about | dataclasses.asdict(reply))
        with self._lock:
            self._outages = 0
            self.served |= {str(kept["served"])} if kept.get("served") else set()
        return kept["text"]

    def map(self, function: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
        """The function's values in order, several at once; the first error of one ends all."""
        self._stop.clear()
        errors: list[Exception] = []

        def unless_stopped(item: Item) -> T | None:
            try:
                return None if self._stop.is_set() else function(item)
            except Exception as error:
                errors.append(error)
                self._stop.set()  # also wakes those that wait before they repeat a request
                return None

        pool = concurrent.futures.ThreadPoolExecutor(self._workers)
        try:
            values = list(pool.map(unless_stopped, items))
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._stop.clear()
        if errors:
            raise errors[0]
        return values

    def _insist(self, request: dict[str, Any]) -> Reply:
        for waited in range(self._retries + 1):
            self._count(calls=1)
            try:
                reply = self._complete(request)
            except (TryAgainError, UserError) as error:
                self._count(failures=1)
                if not isinstance(error, TryAgainError):
                    raise
                failed = error
            else:
                self._count(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
                return reply
            wait = min(60.0, self._backoff * 2**waited) * random.uniform(0.5, 1.0) if failed.after is None else failed.after
            if waited == self._retries or wait > LONGEST_WAIT or self._stop.wait(wait):
                break
        raise self._given_up(failed)

    def _given_up(self, failed: TryAgainError) -> UserError:
        with self._lock:
            self._outages += failed.outage
            if self._outages >= OUTAGES:
                return UserError(f"the judge does not answer: {failed}. What it said so far is kept; start again later")
        return JudgeError(f"the judge gave no answer to a question: {failed}")

    def _count(self, **more: int) -> None:
        with self._lock:
            used = dataclasses.replace(self.usage, **{name: getattr(self.usage, name) + n for name, n in more.items()})
            cost = used.prompt_tokens * self._prices[0] + used.completion_tokens * self._prices[1]
            self.usage = dataclasses.replace(used, cost=cost / 1e6)
            if self._watch:
                self._watch(self.usage)


class _Cache:
    """Replies by what was asked. A line is written at once; one that was cut off by a kill is passed over."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._kept: dict[str, dict[str, Any]] = {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = file.read_bytes().split(b"\n") if file.exists() else []
        except OSError as error:
            raise UserError(f"the judge's replies in {file} cannot be read: {error}") from error
        for line in lines:
            try:
                entry = json.loads(line)
                if isinstance(entry["key"], str) and isinstance(entry["text"], str):
                    self._kept.setdefault(entry["key"], entry)
            except (ValueError, LookupError, TypeError):
                continue

    def get(self, key: str) -> dict[str, Any] | None:
        return self._kept.get(key)

    def keep(self, key: str, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, or that which another thread kept meanwhile: what is asked twice has one reply, now and later."""
        with self._lock:
            if key not in self._kept:
                self._append(json.dumps({"key": key} | entry).encode() + b"\n")
                self._kept[key] = entry
            return self._kept[key]

    def _append(self, line: bytes) -> None:
        try:
            with open(self._file, "a+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                    line = (b"" if file.read(1) == b"\n" else b"\n") + line
                if file.write(line) != len(line):
                    raise OSError("the disk is full")
        except OSError as error:
            raise UserError(f"a reply of the judge cannot be added to {self._file}: {error}") from error

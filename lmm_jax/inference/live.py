"""Requests that come and go at any time, on one thread that owns the device.

    submit ─► waiting ─ embed, enter ─► slots ─ a few tokens for all ─► who asked
                 │
                 └ a long video: between its chunks the others go on generating, and short requests enter

A turn generates some tokens for every row, takes in what waits while the device is busy, and hands out what came. Slots grow
and shrink with what is asked, in few steps, so that one short question does not pay for room that nobody uses.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lmm_jax.data.layout import Layout
from lmm_jax.errors import DeviceError, TryLaterError, UserError
from lmm_jax.inference.buckets import length_bucket, power_of_two
from lmm_jax.inference.engine import MAX_BATCH, Engine, Request, failed
from lmm_jax.inference.slots import Slots
from lmm_jax.inference.tickets import Event, Ticket

TOGETHER = 8  # requests of like length that are embedded in one program
LOOK_SECONDS = 0.05  # between two looks at what was generated
MOST_STEPS = 8  # tokens between two looks, however fast they come
PASSED = 64  # requests that may overtake one for which there is no room yet
QUIET_TURNS = 64  # with fewer rows than there is room for, before the room is given back
FAILURES = 3  # turns one after the other that fail before the engine counts as ill
_STEP = 4  # from one size of the cache to the next
_LENGTH = 256  # positions of the shortest

log = logging.getLogger(__name__)


class Live:
    """An engine that answers requests as they come. Its thread begins at once; `close` ends it."""

    def __init__(self, engine: Engine, stop_ids: Sequence[int], *, rows: int = MAX_BATCH) -> None:
        """Compiles nothing yet.

        Args:
          engine: no other thread may use it from now on.
          stop_ids: token ids that end an answer.
          rows: that generate at once, at most.
        """
        self._engine, self._stop, self._most = engine, np.array(stop_ids, np.int32), rows
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: list[Ticket] = []
        self._entering: list[Ticket] = []  # whose pictures are being encoded
        self._slots: Slots | None = None
        self._sizes = (0, 0)  # rows and positions of the slots
        self._quiet = 0
        self._steps = 1
        self._is_closing = self._is_stopping = False
        self._failures = 0  # turns that failed since one did not
        self._thread = threading.Thread(target=self._work, name="live engine", daemon=True)
        self._thread.start()

    # ---- any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: Request, tell: Callable[[Event], None], seconds: float | None = None) -> Ticket:
        """Takes a request; `tell` is called with what comes of it, from the engine's thread, `Ended` at last.

        Raises:
          UserError: the model's context cannot hold it; the engine is closed.
        """
        if self._is_closing:
            raise TryLaterError("no more questions are taken: the server is about to stop")
        ticket = Ticket(request, tell, self._engine.measure(request), seconds)
        self._inbox.put(ticket)
        return ticket

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._inbox.qsize() + len(self._waiting) + len(self._entering)

    @property
    def running(self) -> int:
        """Requests that generate."""
        return len(self._running)

    @property
    def is_well(self) -> bool:
        """Whether requests are answered, as far as the last ones tell."""
        return self._thread.is_alive() and self._failures < FAILURES

    def close(self, *, finish: bool = True, timeout: float | None = None) -> bool:
        """Takes no more requests, and ends when those under way are answered, or at once without `finish`.

        Returns False where that took longer than `timeout` seconds.
        """
        self._is_closing, self._is_stopping = True, self._is_stopping or not finish
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- the engine's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._is_stopping:
            is_idle = not (self._running or self._waiting)
            if is_idle and self._is_closing and self._inbox.empty():
                return
            self._receive(wait=is_idle)
            self._turn()
        self._receive(wait=False)
        for ticket in [*self._running, *self._waiting]:
            ticket.end(_stopped())

    def _receive(self, wait: bool) -> None:
        while wait or not self._inbox.empty():
            wait = False
            if ticket := self._inbox.get():
                self._waiting.append(ticket)

    def _turn(self, is_between: bool = False) -> None:
        """Some tokens for all rows; `is_between` chunks of a long video, which is then the only one."""
        self._receive(wait=False)
        batch: list[Ticket] = []
        try:
            self._leave_early()
            start = time.monotonic()
            if self._slots:
                self._slots.advance(self._steps)
            batch = self._pick(is_between)
            if batch and not is_between:
                self._enter(batch)
            self._hand_out()
            if self._running and not batch:
                self._pace(time.monotonic() - start, LOOK_SECONDS)
            if batch and is_between:
                self._enter(batch, is_between)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            self._fail(_told(error), batch)

    def _pace(self, seconds: float, target: float) -> None:
        """As many steps for a turn as take the `target`, after one whose steps took so many seconds."""
        each = seconds / self._steps
        self._steps = int(min(MOST_STEPS, max(1, target / max(each, 1e-6))))

    def _leave_early(self) -> None:
        """Those that nobody waits for any more, or that are too late."""
        over = [t for t in self._running if t.is_over()]
        if over and self._slots:
            self._slots.drop(over)
        late = [t for t in self._waiting if t.is_over()]
        self._running = [t for t in self._running if t not in over]
        self._waiting = collections.deque(t for t in self._waiting if t not in late)
        for ticket in [*over, *late]:
            ticket.end_early()

    def _pick(self, only_short: bool) -> list[Ticket]:
        """The next requests for which there is room, of like length, as many as one program takes."""
        batch: list[Ticket] = []
        for ticket in list(self._waiting):
            is_long = ticket.images > self._engine.images.chunk
            fits = self._fits([*batch, ticket])
            like = not batch or _alike(ticket.length, batch[0].length)
            if fits and like and not (is_long and (only_short or batch)):
                batch.append(ticket)
                if is_long or len(batch) == TOGETHER:
                    break
            elif not fits and ticket.passed >= PASSED:
                break
        while len(batch) & (len(batch) - 1):
            batch.pop()
        if batch:
            for ticket in itertools.takewhile(lambda t: t is not batch[-1], self._waiting):
                ticket.passed += ticket not in batch
        self._waiting = collections.deque(t for t in self._waiting if t not in batch)
        return batch

    def _fits(self, more: Sequence[Ticket]) -> bool:
        """Whether there are rows and memory for these, too; one alone always has them."""
        (rows, length), count = self._wanted(more), len(self._running) + len(self._entering) + len(more)
        return count == 1 or (count <= self._most and self._engine.programs.size(rows) * length <= self._engine.positions)

    def _wanted(self, more: Sequence[Ticket] = ()) -> tuple[int, int]:
        """Sizes of slots that hold those under way and `more`."""
        tickets = [*self._running, *self._entering, *more]
        context = self._engine.config.decoder.max_position_embeddings
        longest = max((t.positions for t in tickets), default=1)
        rows = min(self._most, _level(max(1, len(tickets)), 1))
        length = max(min(length_bucket(context), _level(longest, _LENGTH)), length_bucket(longest))
        if self._engine.programs.size(rows) * length > self._engine.positions:  # then no more than is needed
            return min(self._most, power_of_two(max(1, len(tickets)))), length_bucket(longest)
        return rows, length

    def _enter(self, batch: list[Ticket], is_between: bool = False) -> None:
        """Embeds requests and gives them slots. What fails before they have them fails alone."""
        start = time.monotonic()
        self._entering += batch
        try:
            x, layout = self._embed(batch)
        except Exception as error:
            self._refuse(batch, error)
            return
        is_hidden = self._slots is None or self._slots.is_ready  # generating took no longer than our own work
        if not is_between:
            self._hand_out()  # what the rows before have generated meanwhile
        generated = 0.0 if is_hidden else time.monotonic() - start
        try:
            x.block_until_ready()
        except Exception as error:
            self._refuse(batch, error)
            return
        self._entering = [t for t in self._entering if t not in batch]
        seconds = time.monotonic() - start
        if self._running and not is_between:  # those who enter and those who generate share the device
            self._pace(generated, max(LOOK_SECONDS, seconds))
        self._fit(batch)
        self._running += batch
        rows = []
        for n, ticket in enumerate(batch):
            sampling = dataclasses.replace(ticket.request.sampling, max_new_tokens=ticket.limit)
            rows.append((ticket, n, int(layout.lengths[n]), sampling))
            ticket.begin(seconds)
        self._slots.enter(x, rows)
        self._hand_out()

    def _refuse(self, batch: list[Ticket], error: Exception) -> None:
        """Requests that could not be embedded."""
        self._entering = [t for t in self._entering if t not in batch]
        for ticket in batch:
            ticket.end_early() if isinstance(error, _Left) and ticket.is_over() else ticket.end(_told(error))

    def _embed(self, batch: list[Ticket]) -> tuple[jax.Array, Layout]:
        requests = [t.request for t in batch]
        rows, media = [r.row() for r in requests], [r.media for r in requests]
        if batch[0].images > self._engine.images.chunk:  # others are embedded in between
            return self._engine.embed(rows, media, self._between(batch[0]))
        return self._engine.embed_aside(rows, media)

    def _between(self, ticket: Ticket) -> Callable[[], None]:
        """What happens between two chunks of a long video."""

        def between() -> None:
            self._turn(is_between=True)
            if ticket.is_over() or self._is_stopping:
                raise _Left

        return between

    def _fit(self, more: Sequence[Ticket]) -> None:
        """Slots that hold these, too: larger at once, smaller when they were for a while."""
        wanted = self._wanted(more)
        held = self._sizes if self._slots else (0, 0)
        if not self._running:  # nothing to move
            if wanted != held:
                self._slots = None
                self._slots = Slots(self._engine.programs, self._engine.params, *wanted, wanted[1], self._stop)
                self._sizes = wanted
            return
        larger = tuple(max(a, b) for a, b in zip(wanted, held))
        if self._engine.programs.size(larger[0]) * larger[1] > self._engine.positions:
            larger = wanted
        if larger != held:
            self._slots.resize(*larger, larger[1])
            self._sizes = larger

    def _hand_out(self) -> None:
        """Tells everyone what was generated; those that are done leave."""
        if not self._running:
            return
        done = dict(self._slots.leave())
        told = done | self._slots.tokens()
        for ticket, tokens in told.items():
            ticket.tell(tokens)
        self._running = [t for t in self._running if t not in done]
        for ticket in done:
            ticket.end()
        self._shrink()

    def _shrink(self) -> None:
        wanted = self._wanted()
        self._quiet = self._quiet + 1 if self._running and wanted[0] * wanted[1] < self._sizes[0] * self._sizes[1] else 0
        if self._quiet > QUIET_TURNS:
            self._quiet = 0
            self._slots.resize(*wanted, wanted[1])
            self._sizes = wanted

    def _fail(self, error: UserError, batch: list[Ticket]) -> None:
        """The cache may be lost with the program that failed: rows in it cannot go on, nor those that were to enter."""
        self._slots, self._sizes = None, (0, 0)
        if not isinstance(error, DeviceError):
            error = TryLaterError(f"there is too little memory for all that is asked at once: try again later ({error})")
        for ticket in [*self._running, *batch]:
            ticket.end(error)
        self._running = []
        self._entering = [t for t in self._entering if t not in batch]


def _stopped() -> UserError:
    return TryLaterError("the server stopped before the answer was done")


def _told(error: Exception) -> UserError:
    """What the one who asked is told."""
    if isinstance(error, _Left):
        return _stopped()
    if isinstance(error, UserError):
        return error
    if isinstance(error, jax.errors.JaxRuntimeError):
        return failed(error)
    log.error("the engine failed", exc_info=error)  # a mistake of ours must not silence the server
    return DeviceError("the engine failed; the server's log says why")


class _Left(Exception):
    """Nobody wants the video that is being encoded any more."""


def _alike(one: int, other: int) -> bool:
    """Whether prompts of so many positions go into one program: neither is padded to more than one and a half of its room."""
    small, large = sorted(map(length_bucket, (one, other)))
    return 2 * large <= 3 * small


def _level(n: int, least: int) -> int:
    """The first of least, 4·least, 16·least, … that is at least `n`."""
    while least < n:
        least *= _STEP
    return least

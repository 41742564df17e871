"""Requests that come and go: answers as alone, whoever else is there, and places that are free when they should be."""

import queue
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.test_engine import STOP, mixed_requests, picture, prompt

import lmm_jax
from lmm_jax.config import named_sizes
from lmm_jax.errors import DeadlineError, UserError
from lmm_jax.inference import live as live_module
from lmm_jax.inference.engine import Engine, Request
from lmm_jax.inference.live import Live
from lmm_jax.inference.sampling import Sampling
from lmm_jax.inference.tickets import Began, Ended, Ticket, Tokens
from lmm_jax.sharding import make_mesh


class Listener:
    """Collects what comes of a request."""

    def __init__(self):
        self.events, self.ids, self.ended, self.error = [], [], threading.Event(), None

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Tokens):
            self.ids += event.ids
        if isinstance(event, Ended):
            self.error = event.error
            self.ended.set()

    def wait(self):
        assert self.ended.wait(120)
        return self.ids


@pytest.fixture
def engine(tiny):
    return lmm_jax.load(tiny("tiny")).engine


@pytest.fixture
def start(engine):
    """Settings -> a live engine, closed after the test."""
    began = []

    def begin(**settings):
        began.append(Live(engine, STOP, **settings))
        return began[-1]

    yield begin
    for live in began:
        assert live.close(finish=False, timeout=60)


def ask(live, request, seconds=None):
    listener = Listener()
    listener.ticket = live.submit(request, listener, seconds)
    return listener


def text(new, seed=0, length=9):
    return Request(prompt(seed, length, 0), (), Sampling(new, seed=seed))


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_answers_are_those_of_asking_alone(engine, start):
    requests = mixed_requests(engine.config, 24)
    alone = [engine.generate([r], STOP)[0] for r in requests]
    live = start(rows=5)
    listeners = []
    for n, request in enumerate(requests):
        listeners.append(ask(live, request))
        if n % 7 == 6:
            listeners[n - 3].wait()
    assert [x.wait() for x in listeners] == alone
    for x in listeners:
        assert [type(e) for e in x.events[:2]] == [Began, Tokens] and x.error is None
    assert live.waiting == live.running == 0 and live.is_well


def test_short_ones_overtake_a_long_one(start):
    live = start(rows=2)
    long = ask(live, Request(prompt(0, 9, 0), (), Sampling(400, ignore_eos=True)))
    until(lambda: long.ids)
    short = [ask(live, text(3, seed)) for seed in range(6)]
    for x in short:
        x.wait()
    assert not long.ended.is_set()
    assert len(long.wait()) == 400


@pytest.mark.slow
def test_who_enters_and_who_generates_share_the_device(engine, start, monkeypatch):
    """While requests come all the time, and to embed each takes long, one that generates gets more than a token for each."""
    embed, advance, steps = engine.embed, live_module.Slots.advance, []

    def slow(*args):
        done = embed(*args)
        time.sleep(0.3)
        return done

    monkeypatch.setattr(engine, "embed", slow)
    monkeypatch.setattr(live_module.Slots, "advance", lambda self, n, *args: (steps.append(n), advance(self, n, *args))[1])
    live = start(rows=5)
    lengths = (45, 90, 180, 360)  # so unlike that they enter one by one
    requests = [Request(prompt(0, 9, 0), (), Sampling(300, ignore_eos=True)), *(text(1, n, n) for n in lengths)]
    for listener in [ask(live, request) for request in requests][1:]:
        listener.wait()
    assert steps[:4] == [1, *[live_module.MOST_STEPS] * 3]


def test_others_go_on_while_a_long_video_is_encoded(engine, start):
    frames = [picture(n, engine.config) for n in range(3 * engine.images.chunk + 1)]
    video = Request(prompt(1, 9, 1), [frames], Sampling(4))
    alone = engine.generate([video, text(6, 5)], STOP)
    live, told = start(), []
    release = threading.Semaphore(0)

    class Slow(list):
        def __iter__(self):
            for number, frame in enumerate(frames):
                if number == engine.images.chunk + 1:
                    told.append(True)
                    assert release.acquire(timeout=60)
                yield frame

    running = ask(live, text(200, 3))
    until(lambda: running.ids)
    slow = ask(live, Request(video.ids, [Slow(frames)], video.sampling))
    until(lambda: told)
    short = ask(live, text(6, 5))  # comes while the video is encoded
    release.release()
    assert short.wait() == alone[1]
    assert slow.wait() == alone[0]
    assert short.events[0].waited < slow.events[0].waited + slow.events[0].encode_seconds


def test_a_client_that_leaves_frees_its_place(start):
    live = start(rows=1)
    leaving = ask(live, Request(prompt(0, 9, 0), (), Sampling(2000, temperature=2.0)))
    until(lambda: leaving.ids)
    waiting = ask(live, text(3))
    leaving.ticket.cancel()
    assert len(waiting.wait()) == 3
    assert leaving.ended.is_set() and leaving.error is None and len(leaving.ids) < 2000


def test_deadlines_hold_for_those_that_run_and_those_that_wait(start):
    live = start(rows=1)
    first = ask(live, Request(prompt(0, 9, 0), (), Sampling(2000, temperature=2.0)), seconds=3600)
    until(lambda: first.ids)
    second = ask(live, text(3), seconds=0.05)
    second.wait()
    assert isinstance(second.error, DeadlineError)
    first.ticket._deadline = time.monotonic()
    first.wait()
    assert isinstance(first.error, DeadlineError)
    assert len(ask(live, text(3)).wait()) == 3


def test_a_step_that_fails_fails_those_in_it_and_no_others(engine, start, monkeypatch):
    live = start()
    running = ask(live, Request(prompt(0, 9, 0), (), Sampling(2000, temperature=2.0)))
    until(lambda: running.ids)
    decode, failing = engine.programs.decode, threading.Event()

    def broken(*args):
        if failing.is_set():
            failing.clear()
            raise jax.errors.JaxRuntimeError("INTERNAL: the chip is on fire")
        return decode(*args)

    monkeypatch.setattr(engine.programs, "decode", broken)
    failing.set()
    running.wait()
    assert "the chip is on fire" in str(running.error)
    assert ask(live, text(3)).wait() == engine.generate([text(3)], STOP)[0]


def test_pictures_that_fail_fail_alone(engine, start):
    class Broken(list):
        def __iter__(self):
            raise UserError("cannot be read")

    live = start()
    bad = ask(live, Request(prompt(0, 9, 1), [Broken([1, 2])], Sampling(3)))
    bad.wait()
    assert "cannot be read" in str(bad.error)

    class Wrong(list):
        def __iter__(self):
            raise KeyError("a mistake of ours")

    wrong = ask(live, Request(prompt(0, 9, 1), [Wrong([1])], Sampling(3)))
    wrong.wait()
    assert "log" in str(wrong.error) and "mistake" not in str(wrong.error)
    assert len(ask(live, text(3)).wait()) == 3


@pytest.mark.slow
def test_slots_grow_and_shrink_with_what_is_asked(engine, start, monkeypatch):
    monkeypatch.setattr(live_module, "QUIET_TURNS", 2)
    live = start(rows=8)
    long = ask(live, Request(prompt(0, 9, 0), (), Sampling(1500, temperature=2.0, seed=1)))
    until(lambda: long.ids)
    assert live._sizes[0] == 1
    others = [ask(live, text(30, seed)) for seed in range(7)]
    for seed, x in enumerate(others):
        assert x.wait() == engine.generate([text(30, seed)], STOP)[0]
    if not long.ended.is_set():
        until(lambda: live._sizes[0] == 1 or long.ended.is_set())
    alone = engine.generate([Request(prompt(0, 9, 0), (), Sampling(1500, temperature=2.0, seed=1))], STOP)[0]
    assert long.wait() == alone


@pytest.mark.parametrize("new, at_once", [(512, 8), (100, 32), (5000, 2)])
def test_how_many_requests_of_a_large_model_share_its_cache(new, at_once):
    """4 GiB of Vicuna-7B are 8,192 positions in bfloat16."""
    config = named_sizes()["llava-mini-vicuna-7b"]
    live = Live(Engine(config, None, make_mesh(None), dtype=jnp.bfloat16), STOP)
    limit = min(new, config.decoder.max_position_embeddings - 60)
    tickets = [Ticket(Request(np.full(60, 5)), print, (60, limit), None) for _ in range(32)]
    fitting = max(n for n in range(1, 33) if live._fits(tickets[:n]))
    assert live.close() and fitting == at_once


def test_closing_finishes_what_runs_and_takes_no_more(engine):
    live = Live(engine, STOP)
    asked = [ask(live, text(40, seed)) for seed in range(3)]
    assert live.close(timeout=60)
    assert all(len(x.wait()) > 0 and x.error is None for x in asked)
    with pytest.raises(UserError, match="about to stop"):
        live.submit(text(1), lambda event: None)


def test_closing_at_once_tells_those_that_run(engine):
    live = Live(engine, STOP, rows=1)
    asked = [ask(live, Request(prompt(s, 9, 0), (), Sampling(2000, temperature=2.0))) for s in range(3)]
    until(lambda: asked[0].ids)
    assert live.close(finish=False, timeout=60)
    assert all("stopped" in str(x.error) for x in asked if x.ended.wait(1))


def test_a_prompt_that_is_too_long_is_refused_at_once(engine, start):
    live = start()
    limit = engine.config.decoder.max_position_embeddings
    with pytest.raises(UserError, match="context"):
        live.submit(Request(np.full(limit, 5), (), Sampling()), queue.Queue().put)

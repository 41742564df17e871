"""Judges: against a real HTTP server that is slow, broken or malformed; what is kept on disk."""

import concurrent.futures
import contextlib
import datetime
import email.utils
import http.server
import json
import subprocess
import sys
import threading
import time

import pytest
from evaluation.judge_server import Handler, completion, cuts_off, fails, hangs_up, says, sends, serving, sleeps, trickles
from evaluation.judging import canned

from lmm_jax.errors import UserError
from lmm_jax.evaluation.judge import Endpoint, Judge, JudgeError, Reply
from lmm_jax.evaluation.verdicts import settle, settle_all

KEY = "sk-made-up-0123456789abcdef"
ASKED = [{"role": "user", "content": "How right is it?"}]


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as server:
        yield server


@pytest.fixture
def judge(server, tmp_path):
    def make(*script, timeout=5.0, **settings):
        server.script[:] = script
        settings = {"backoff": 0.001, "retries": 3} | settings
        return Judge("made-up", Endpoint(server.base, timeout=timeout), tmp_path / "replies.jsonl", **settings)

    return make


# ---- asking


def test_a_reply_is_asked_for_once_and_then_comes_from_disk(judge, server, tmp_path):
    seen = []
    asking = judge(says("0.5", prompt_tokens=100, completion_tokens=2), prices=(2.0, 10.0), watch=seen.append)
    assert asking.ask(ASKED, temperature=0.2, max_tokens=3) == "0.5"
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    assert request["body"] == {"model": "made-up", "messages": ASKED, "temperature": 0.2, "max_tokens": 3}
    assert asking.usage.cost == pytest.approx((100 * 2 + 2 * 10) / 1e6)
    assert asking.served == {"judge-0001"}

    again = judge(says("other"))
    assert again.ask(ASKED, temperature=0.2, max_tokens=3) == "0.5"
    assert (again.usage.calls, again.usage.cached, again.usage.cost) == (0, 1, 0.0)
    assert again.served == {"judge-0001"}
    assert (seen[-1].calls, seen[-1].prompt_tokens, seen[-1].completion_tokens) == (1, 100, 2)
    line = json.loads((tmp_path / "replies.jsonl").read_text())
    kept = {name: line[name] for name in ("model", "messages", "temperature", "max_tokens", "attempt", "text", "served")}
    assert kept == request["body"] | {"attempt": 0, "text": "0.5", "served": "judge-0001"}


def test_what_is_not_set_is_not_sent(judge, server):
    judge(says("x")).ask(ASKED)
    assert server.requests[0]["body"] == {"model": "made-up", "messages": ASKED}


def test_every_part_of_the_question_tells_replies_apart(judge, server, tmp_path):
    other = [{"role": "user", "content": "And this?"}]
    asked = [(ASKED, {}), (other, {}), (ASKED, {"temperature": 0.0}), (ASKED, {"max_tokens": 3}), (ASKED, {"attempt": 1})]
    for script in ([says(str(i)) for i in range(6)], [says("new")]):
        asking = judge(*script)
        assert [asking.ask(messages, **settings) for messages, settings in asked] == ["0", "1", "2", "3", "4"]
    stranger = Judge("another", Endpoint(server.base), tmp_path / "replies.jsonl")
    assert stranger.ask(ASKED) == "new"


@pytest.mark.parametrize(
    "trouble",
    [
        fails(500),
        fails(503),
        fails(429),
        fails(408),
        hangs_up,
        cuts_off,
        sends(b"not JSON"),
        sends(b"\xff\xfe"),
        sends(b"[" * 100_000),
        sends([]),
        sends({"choices": []}),
        sends({"choices": [{}]}),
        sends({"choices": [{"message": {"content": None}}]}),
        sends({"error": "busy"}),
    ],
)
def test_trouble_that_passes_is_waited_out(judge, server, trouble):
    asking = judge(trouble, trouble, says("fine"))
    assert asking.ask(ASKED) == "fine"
    assert (asking.usage.calls, asking.usage.failures, len(server.requests)) == (3, 2, 3)


@pytest.mark.parametrize("trouble", [fails(500), hangs_up, sends(b"not JSON"), sends({"choices": []})])
def test_trouble_that_stays_is_given_up(judge, server, trouble, tmp_path):
    asking = judge(trouble)
    with pytest.raises(JudgeError, match="gave no answer"):
        asking.ask(ASKED)
    assert (asking.usage.calls, asking.usage.failures, len(server.requests)) == (4, 4, 4)
    assert judge(says("later")).ask(ASKED) == "later", "what failed is not kept"


@pytest.mark.parametrize("slow", [sleeps, trickles])
def test_a_slow_server_does_not_hold_up(judge, slow):
    asking = judge(slow, says("fine"), timeout=0.3)
    start = time.monotonic()
    assert asking.ask(ASKED) == "fine"
    assert time.monotonic() - start < 4
    assert asking.usage.failures == 1


def test_retry_after_is_waited(judge, server):
    asking = judge(fails(429, ("Retry-After", "0.4")), says("fine"), backoff=100)
    assert asking.ask(ASKED) == "fine"
    assert 0.4 <= server.requests[1]["at"] - server.requests[0]["at"] < 2


def test_retry_after_may_be_a_date(judge, server):
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
    asking = judge(fails(503, ("Retry-After", email.utils.format_datetime(then, usegmt=True))), says("fine"), backoff=100)
    assert asking.ask(ASKED) == "fine"
    assert 0.5 < server.requests[1]["at"] - server.requests[0]["at"] < 3


@pytest.mark.parametrize("value", ["soon", "nan", "Mon, 99 Nonsense"])
def test_a_retry_after_that_says_nothing_is_passed_over(judge, value):
    assert judge(fails(429, ("Retry-After", value)), says("fine")).ask(ASKED) == "fine"


def test_nobody_waits_for_an_hour(judge, server):
    with pytest.raises(JudgeError):
        judge(fails(429, ("Retry-After", "3600"))).ask(ASKED)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "status, sentence", [(401, "wants a key"), (403, "wants a key"), (404, "no judge"), (302, "no judge")]
)
def test_a_wrong_setting_ends_all_at_once(judge, server, status, sentence):
    asking = judge(fails(status, ("Location", server.base + "/elsewhere"), body=f"bad key {KEY}".encode()))
    with pytest.raises(UserError, match=sentence) as caught:
        asking.map(lambda i: asking.ask(ASKED, attempt=i), range(50))
    assert not isinstance(caught.value, JudgeError)
    assert len(server.requests) <= 8
    assert KEY not in str(caught.value)
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}, "nothing is redirected"


def test_a_refused_question_is_not_repeated_and_leaves_the_others_alone(judge, server):
    asking = judge(fails(400, body=b'{"error": "content"}'), says("fine"), workers=1)
    verdicts = settle_all(asking, lambda i: settle(asking, [(ASKED, float(i))], lambda text: text), [0, 1, 2])
    assert [v.value for v in verdicts] == [None, "fine", "fine"]
    assert "HTTP 400" in verdicts[0].problem and len(server.requests) == 3


def test_an_outage_ends_all(judge, server):
    asking = judge(fails(503), workers=1, retries=1)
    with pytest.raises(UserError, match="start again later") as caught:
        settle_all(asking, lambda i: settle(asking, [(ASKED, float(i))], lambda text: text), list(range(100)))
    assert not isinstance(caught.value, JudgeError)
    assert len(server.requests) == 10


def test_nobody_listens(tmp_path, server):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as gone:
        base = f"http://127.0.0.1:{gone.server_port}/v1"
    with pytest.raises(JudgeError, match="cannot be reached"):
        Judge("m", Endpoint(base), tmp_path / "c", retries=1, backoff=0).ask(ASKED)


def test_several_at_once_in_order(judge):
    eight = threading.Barrier(8)

    def waits_for_seven_others(handler):
        eight.wait(timeout=20)
        handler.answer(completion("x"))

    asking = judge(waits_for_seven_others, workers=8, timeout=30.0)
    assert asking.map(lambda i: asking.ask(ASKED, attempt=i) and i, range(16)) == list(range(16))
    assert (asking.usage.calls, asking.usage.failures) == (16, 0)


def test_an_interruption_ends_all(judge, monkeypatch):
    """Whoever waits to repeat a request is woken, and nothing more is asked."""
    asking = judge(fails(503), backoff=1000, workers=4)
    interrupted = concurrent.futures.ThreadPoolExecutor.map

    def interrupt(pool, function, items):
        interrupted(pool, function, items)
        while asking.usage.failures < 4:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "map", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asking.map(lambda i: asking.ask(ASKED, attempt=i), range(100))
    assert asking.usage.calls == 4 and time.monotonic() - start < 10


def test_without_a_key_none_is_sent(judge, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    judge(says("x")).ask(ASKED)
    assert "Authorization" not in server.requests[0]["headers"]
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        judge(fails(401)).ask(ASKED, attempt=1)


def test_the_key_comes_from_the_named_variable_and_goes_nowhere_else(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OTHER_KEY", "other-" + KEY + "\n")
    endpoint = Endpoint(server.base, key_variable="OTHER_KEY")
    server.script[:] = [
        fails(500, body=f"your key other-{KEY}".encode()),
        says("fine"),
        fails(400, body=f"other-{KEY}".encode()),
    ]
    asking = Judge("m", endpoint, tmp_path / "c.jsonl", backoff=0)
    asking.ask(ASKED)
    with pytest.raises(JudgeError) as caught:
        asking.ask(ASKED, attempt=1)
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer other-{KEY}"
    said = "".join(capfd.readouterr()) + (tmp_path / "c.jsonl").read_text() + str(caught.value) + repr(endpoint)
    assert KEY not in said


@pytest.mark.parametrize("key", ["with\nline", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_told(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds") as caught:
        Endpoint()
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "base", ["", "ftp://x", "api.openai.com", "http://", "https://me:pw@x/v1", "http://x:port/", "http://x?key=1"]
)
def test_an_address_that_is_none(base):
    with pytest.raises(UserError, match="address") as caught:
        Endpoint(base)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"model": ""}, {"runs": 0}, {"workers": 0}, {"retries": -1}, {"prices": (-1, 0)}])
def test_settings_out_of_range(tmp_path, wrong):
    with pytest.raises(UserError):
        Judge(**{"model": "m", "complete": Reply, "cache": tmp_path / "c"} | wrong)


def test_any_function_can_judge(tmp_path):
    def complete(request):
        assert request == {"model": "mine", "messages": ASKED}
        return Reply("1.0")

    assert Judge("mine", complete, tmp_path / "deep" / "er" / "c.jsonl").ask(ASKED) == "1.0"


# ---- the cache


def test_a_line_cut_off_anywhere_costs_itself_alone(tmp_path):
    file = tmp_path / "replies.jsonl"
    judge = canned(file, lambda request: request["messages"][0]["content"] + "\nümläut \ud800")
    messages = [[{"role": "user", "content": str(i)}] for i in range(3)]
    replies = [judge.ask(m) for m in messages]
    whole = file.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (*range(last, len(whole), 13), len(whole) - 1):
        file.write_bytes(whole[:cut])
        calls = []
        again = canned(file, lambda request, calls=calls: calls.append(1) or "new")
        assert [again.ask(m) for m in messages[:2]] == replies[:2]
        third = again.ask(messages[2])
        assert (third, len(calls)) in (("new", 1), (replies[2], 0)), cut
        assert (third == "new") == (cut < len(whole) - 1), "a line that lacks its end of line alone is whole"
        again.ask([{"role": "user", "content": "more"}])
        assert [canned(file, calls.append).ask(m) for m in messages] == [*replies[:2], third]


def test_lines_that_are_nothing_are_passed_over(tmp_path):
    file = tmp_path / "replies.jsonl"
    canned(file, lambda request: "kept").ask(ASKED)
    junk = b'\n\n{"key": 3}\n[]\n"x"\nnull\n\xff\n{"key": "a", "text": null}\n'
    file.write_bytes(junk + file.read_bytes())
    assert canned(file, lambda request: "new").ask(ASKED) == "kept"


ASK_ON = """
import pathlib, sys
from lmm_jax.evaluation.judge import Judge, Reply
judge = Judge("m", lambda request: Reply("x" * 5000), pathlib.Path(sys.argv[1]), workers=4)
judge.map(lambda i: judge.ask([], attempt=i), range(100_000))
"""


def test_a_kill_at_any_moment_loses_no_reply_that_was_written(tmp_path):
    file, kept = tmp_path / "replies.jsonl", 0
    for moment in (0.15, 0.2, 0.25):
        process = subprocess.Popen([sys.executable, "-c", ASK_ON, str(file)])
        while not file.exists() or file.stat().st_size < 100_000 + kept * 6000:
            time.sleep(0.005)
        time.sleep(moment / 5)
        process.kill()
        process.wait()
        lines = file.read_bytes().split(b"\n")
        broken = [line for line in lines if line and not _is_json(line)]
        assert len(broken) <= 3
        whole = sum(map(_is_json, lines))
        assert whole > kept
        judge = Judge("m", lambda request: Reply("new"), file)
        judge.map(lambda i, judge=judge: judge.ask([], attempt=i), range(whole))
        assert judge.usage.calls <= 8, "the replies of at most as many as were asked at once are not there"
        kept = whole


def _is_json(line):
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(line), dict)
    return False


def test_what_is_asked_twice_at_once_has_one_reply(tmp_path):
    gate, numbers = threading.Barrier(4), iter("abcd")

    def complete(request):
        gate.wait()
        return next(numbers)

    file = tmp_path / "c.jsonl"
    judge = canned(file, complete)
    assert len(set(judge.map(lambda _: judge.ask(ASKED), range(4)))) == 1
    assert len(file.read_text().splitlines()) == 1


def test_of_two_replies_to_one_question_the_first_counts(tmp_path):
    """Two processes may have asked it at once."""
    file, other = tmp_path / "c.jsonl", tmp_path / "other.jsonl"
    canned(file, lambda request: "first").ask(ASKED)
    canned(other, lambda request: "second").ask(ASKED)
    file.write_bytes(file.read_bytes() + other.read_bytes())
    assert canned(file, lambda request: "third").ask(ASKED) == "first"


def test_a_cache_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Judge("m", Reply, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        Judge("m", Reply, tmp_path / "file" / "c.jsonl")

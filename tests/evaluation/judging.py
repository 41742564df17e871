"""What the tests of judged and video benchmarks share."""

import json
from pathlib import Path

from lmm_jax.evaluation.benchmark import Answered, Run
from lmm_jax.evaluation.judge import Judge, Reply

FIXTURES = Path(__file__).parents[1] / "golden" / "evaluation"


def read(file):
    return json.loads(file.read_text())


def read_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def canned(file, reply, **settings):
    """A judge that says what a function of the request says."""
    return Judge("made-up", lambda request: Reply(reply(request)), file, **{"backoff": 0.0} | settings)


class Recorder:
    """A judge's function: replies by what the message to it contains, or one after the other; keeps the requests."""

    def __init__(self, replies):
        self.replies, self.requests = replies, []

    def __call__(self, request):
        self.requests.append(request)
        if not isinstance(self.replies, dict):
            return self.replies[min(len(self.requests), len(self.replies)) - 1]
        text = request["messages"][-1]["content"]
        return next(reply for part, reply in self.replies.items() if part in text)


def run_of(benchmark, folder, replies, judge=None):
    """A run whose replies are given, in order; None is an answer that is missing."""
    records = benchmark.records(folder)
    assert len(records) == len(replies)
    answers = [Answered(r, reply or "", "missing" if reply is None else "") for r, reply in zip(records, replies)]
    return Run(folder, answers, judge)


def named(benchmarks, name):
    (found,) = [b for b in benchmarks if b.name == name]
    return found

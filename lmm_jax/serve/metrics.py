"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        """All are 0."""
        self._registry = CollectorRegistry()
        of = {"registry": self._registry}
        self.requests = Counter("lmm_requests", "Requests answered, by path and status.", ("path", "status"), **of)
        self.prompt_tokens = Counter("lmm_prompt_tokens", "Positions of prompts, vision tokens included.", **of)
        self.tokens = Counter("lmm_generated_tokens", "Tokens generated.", **of)
        self.cancelled = Counter("lmm_cancelled", "Answers whose client left.", **of)
        self.first_token = Histogram("lmm_first_token_seconds", "Until an answer's first token.", buckets=_SECONDS, **of)
        self.answer = Histogram("lmm_answer_seconds", "Until an answer's last token.", buckets=_SECONDS, **of)
        self.running = Gauge("lmm_running", "Answers that are generated now.", **of)
        self.waiting = Gauge("lmm_waiting", "Requests that wait for a slot.", **of)
        self.files = Gauge("lmm_files", "Uploaded files.", **of)

    def text(self) -> bytes:
        """In Prometheus' own form."""
        return generate_latest(self._registry)

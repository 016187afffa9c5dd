"""Prometheus metrics of the HTTP server, with modern Dynamo's names (`dynamo_frontend_*`)."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ITL_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Metrics:
    """One registry a server. Times in seconds, lengths in tokens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kw: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "dynamo_frontend_requests", "Requests by outcome.", ["model", "endpoint", "request_type", "status"], **kw
        )
        self.in_flight = Gauge("dynamo_frontend_inflight_requests", "Requests being answered.", ["model"], **kw)
        self.duration = Histogram(
            "dynamo_frontend_request_duration_seconds", "Whole request.", ["model"], buckets=_SECONDS, **kw
        )
        self.ttft = Histogram("dynamo_frontend_time_to_first_token_seconds", "TTFT.", ["model"], buckets=_SECONDS, **kw)
        self.itl = Histogram(
            "dynamo_frontend_inter_token_latency_seconds",
            "ITL: mean of each stream, weighted by its tokens in _sum and _count.",
            ["model"],
            buckets=_ITL_SECONDS,
            **kw,
        )
        self.isl = Histogram(
            "dynamo_frontend_input_sequence_tokens", "Prompt tokens.", ["model"], buckets=_TOKENS, **kw
        )
        self.osl = Histogram(
            "dynamo_frontend_output_sequence_tokens", "Output tokens.", ["model"], buckets=_TOKENS, **kw
        )
        self.cached = Counter("dynamo_frontend_cached_tokens", "Prompt tokens found in a KV cache.", ["model"], **kw)
        self.disconnects = Counter("dynamo_frontend_disconnects", "Clients that left early.", ["model"], **kw)

    def exposition(self) -> tuple[bytes, str]:
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class Observation:
    """One request's times and counts; `done` records them once."""

    __slots__ = ("_endpoint", "_first", "_kind", "_last", "_metrics", "_model", "_started", "recorded")

    def __init__(self, metrics: Metrics, model: str, endpoint: str, *, stream: bool) -> None:
        self._metrics, self._model, self._endpoint = metrics, model, endpoint
        self._kind = "stream" if stream else "unary"
        self._started = time.monotonic()
        self._first = self._last = 0.0
        self.recorded = False
        metrics.in_flight.labels(model).inc()

    def token(self) -> None:
        """A step's tokens have arrived."""
        self._last = time.monotonic()
        if not self._first:
            self._first = self._last

    def done(self, status: str, prompt_tokens: int = 0, output_tokens: int = 0, cached_tokens: int = 0) -> None:
        """`status`: success, error or disconnect."""
        if self.recorded:
            return
        self.recorded = True
        m, model = self._metrics, self._model
        m.in_flight.labels(model).dec()
        m.requests.labels(model, self._endpoint, self._kind, status).inc()
        m.duration.labels(model).observe(time.monotonic() - self._started)
        if status == "disconnect":
            m.disconnects.labels(model).inc()
        if self._first:
            m.ttft.labels(model).observe(self._first - self._started)
            m.isl.labels(model).observe(prompt_tokens)
            m.osl.labels(model).observe(output_tokens)
            if cached_tokens:
                m.cached.labels(model).inc(cached_tokens)
            if output_tokens > 1 and self._kind == "stream":
                m.itl.labels(model).observe((self._last - self._first) / (output_tokens - 1))

"""Prometheus metrics of the HTTP server, with modern Dynamo's names (`dynamo_frontend_*`)."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate, product
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from dynamo.http.access_log import CompletedRequest, Outcome, log_completed
from dynamo.http.errors import status_of

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_DURATION_SECONDS = (*_SECONDS, 300, 600)
_ITL_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

Status = Outcome

ENDPOINTS = ("chat_completions", "completions")
_ERROR_TYPES = {404: "not_found", 429: "overload", 503: "unavailable", 504: "response_timeout"}
_ENDS: tuple[tuple[Status, str], ...] = (
    ("success", ""), ("disconnect", ""), ("error", "validation"), ("error", "overload"), ("error", "internal"),
    ("error", "unavailable"), ("error", "response_timeout"),
)  # fmt: skip
"""Ends of requests to a model, with their error_type, that are counted from 0: rate() misses the step of a series that
begins with its first event. That is 28 series a model; there are no others."""
_REFUSALS = ("validation", "not_found", "unavailable", "internal")
"""the same of requests that failed before it was clear which model they are for"""


def error_type(error: BaseException) -> str:
    """The label `error_type`, modern Dynamo's: what went wrong, by the HTTP status that the error stands for."""
    status = status_of(error)
    return _ERROR_TYPES.get(status) or ("validation" if status < 500 else "internal")


class _Tokens:
    """What is counted for every token of a model: plain numbers, a tenth of the cost of prometheus_client's objects."""

    __slots__ = ("gaps", "gaps_s", "output")

    def __init__(self) -> None:
        self.output = 0
        self.gaps = [0] * (len(_ITL_SECONDS) + 1)  # one for each bucket, the last without a limit
        self.gaps_s = 0.0


class _TokenCollector(Collector):
    def __init__(self) -> None:
        self.models: dict[str, _Tokens] = {}

    def of(self, model: str) -> _Tokens:
        found = self.models.get(model)
        if found is None:
            found = self.models[model] = _Tokens()
        return found

    def collect(self) -> Iterable[Metric]:
        itl = HistogramMetricFamily(
            "dynamo_frontend_inter_token_latency_seconds", "Time between two tokens of a stream.", labels=["model"]
        )
        output = CounterMetricFamily("dynamo_frontend_output_tokens", "Output tokens, as they come.", labels=["model"])
        for model, tokens in self.models.items():
            limits = [*map(str, map(float, _ITL_SECONDS)), "+Inf"]
            itl.add_metric([model], list(zip(limits, accumulate(tokens.gaps), strict=True)), tokens.gaps_s)
            output.add_metric([model], tokens.output)
        yield itl
        yield output


class _Served(Collector):
    """Of no metrics itself: gives every model that can answer its series, before the others are collected."""

    def __init__(self, metrics: Metrics, models: Callable[[], Iterable[str]]) -> None:
        self._metrics, self._models = metrics, models

    def collect(self) -> Iterable[Metric]:
        for model in self._models():
            self._metrics.of(model)
        return ()


class Metrics:
    """One registry a server. Times in seconds, lengths in tokens."""

    def __init__(self, models: Callable[[], Iterable[str]]) -> None:
        """`models`: names of those that can answer now."""
        self.registry = CollectorRegistry()
        self.registry.register(_Served(self, models))
        kw: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "dynamo_frontend_requests",
            "Requests by outcome: success, error or disconnect. An error has a type, other outcomes an empty one.",
            ["model", "endpoint", "request_type", "status", "error_type"],
            **kw,
        )
        self.in_flight = Gauge("dynamo_frontend_inflight_requests", "Requests being answered.", ["model"], **kw)
        self.queued = Gauge("dynamo_frontend_queued_requests", "Requests without a token so far.", ["model"], **kw)
        self.disconnected = Gauge("dynamo_frontend_disconnected_clients", "Clients that left before the end.", **kw)
        self.duration = Histogram(
            "dynamo_frontend_request_duration_seconds",
            "Whole request, of those that succeeded.",
            ["model"],
            buckets=_DURATION_SECONDS,
            **kw,
        )
        self.ttft = Histogram(
            "dynamo_frontend_time_to_first_token_seconds",
            "TTFT of streams, however they end.",
            ["model"],
            buckets=_SECONDS,
            **kw,
        )
        self.isl = Histogram(
            "dynamo_frontend_input_sequence_tokens", "Prompt tokens.", ["model"], buckets=_TOKENS, **kw
        )
        self.osl = Histogram(
            "dynamo_frontend_output_sequence_tokens", "Output tokens.", ["model"], buckets=_TOKENS, **kw
        )
        self.cached = Histogram(
            "dynamo_frontend_cached_tokens", "Prompt tokens found in a KV cache.", ["model"], buckets=_TOKENS, **kw
        )
        self.tokens = _TokenCollector()
        self.registry.register(self.tokens)
        self._models: dict[str, ModelMetrics] = {}
        for endpoint, error in product(ENDPOINTS, _REFUSALS):
            self._refused(endpoint, error)

    def of(self, model: str) -> ModelMetrics:
        """The metrics of one model; looking up labels for each request costs 12 µs."""
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = ModelMetrics(self, model)
        return found

    def refused(self, endpoint: str, error: BaseException) -> None:
        """Count a request that failed before it was clear which model it is for."""
        self._refused(endpoint, error_type(error)).inc()

    def _refused(self, endpoint: str, error: str) -> Counter:
        return self.requests.labels("", endpoint, "unary", "error", error)

    def exposition(self) -> tuple[bytes, str]:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class ModelMetrics:
    """`Metrics` with the model's label filled in."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.in_flight, self.queued = metrics.in_flight.labels(model), metrics.queued.labels(model)
        self.duration, self.ttft = metrics.duration.labels(model), metrics.ttft.labels(model)
        self.isl, self.osl = metrics.isl.labels(model), metrics.osl.labels(model)
        self.cached, self.tokens = metrics.cached.labels(model), metrics.tokens.of(model)
        self._metrics, self.name = metrics, model
        self._requests: dict[tuple[str, ...], Counter] = {}
        for endpoint, kind, ending in product(ENDPOINTS, ("stream", "unary"), _ENDS):
            self._ended(endpoint, kind, *ending)

    def count(self, endpoint: str, kind: str, status: Status, error: str) -> None:
        self._ended(endpoint, kind, status, error).inc()

    def _ended(self, endpoint: str, kind: str, status: Status, error: str) -> Counter:
        labels = (self.name, endpoint, kind, status, error)
        found = self._requests.get(labels)
        if found is None:
            found = self._requests[labels] = self._metrics.requests.labels(*labels)
        return found


class Observation:
    """One request's times and counts, from when it is accepted until `done`. `started`: `time.monotonic()`."""

    __slots__ = ("_endpoint", "_first", "_kind", "_last", "_metrics", "_model", "_open", "_started", "_tokens")

    def __init__(self, metrics: Metrics, model: str, endpoint: str, *, stream: bool, started: float) -> None:
        self._metrics, self._model, self._endpoint = metrics, metrics.of(model), endpoint
        self._kind = "stream" if stream else "unary"
        self._started = started
        self._first = self._last = 0.0
        self._tokens = self._model.tokens
        self._open = True
        self._model.in_flight.inc()
        self._model.queued.inc()

    @property
    def heard(self) -> float:
        """`time.monotonic()` of the last token; 0 before the first."""
        return self._last

    def tokens(self, count: int) -> None:
        """So many tokens have arrived together."""
        if not count:
            return
        now, found = time.monotonic(), self._tokens
        found.output += count
        if not self._first:
            self._first = now
            self._model.queued.dec()
            if self._kind == "stream":
                self._model.ttft.observe(now - self._started)
        elif self._kind == "stream":
            gap = (now - self._last) / count
            found.gaps[bisect_left(_ITL_SECONDS, gap)] += count
            found.gaps_s += now - self._last
        self._last = now

    def done(
        self,
        status: Status,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        error: BaseException | None = None,
    ) -> None:
        """Record it, with one line in the log; only the first call counts. `error`: of the status of that name."""
        if not self._open:
            return
        self._open = False
        model = self._model
        taken_s = time.monotonic() - self._started
        model.in_flight.dec()
        model.count(self._endpoint, self._kind, status, "" if error is None else error_type(error))
        if status == "success":
            model.duration.observe(taken_s)
        stream, tokens = self._kind == "stream", (prompt_tokens, cached_tokens, output_tokens)
        ttft_s = self._first - self._started if stream and self._first else None
        log_completed(CompletedRequest(self._endpoint, model.name, stream, status, error, taken_s, ttft_s, *tokens))
        if status == "disconnect":
            self._metrics.disconnected.inc()
        if not self._first:
            model.queued.dec()
            return
        model.isl.observe(prompt_tokens)
        model.osl.observe(output_tokens)
        model.cached.observe(cached_tokens)

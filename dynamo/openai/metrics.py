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

ENDPOINTS = ("chat_completions", "completions")
_ERROR_TYPES = {404: "not_found", 429: "overload", 503: "unavailable", 504: "response_timeout"}
_OUTCOMES: tuple[tuple[Outcome, str], ...] = (
    ("success", ""), ("disconnect", ""), ("error", "validation"), ("error", "overload"), ("error", "internal"),
    ("error", "unavailable"), ("error", "response_timeout"),
)  # fmt: skip
"""Outcomes of requests to a model, with their error_type. Their series begin at 0, before the first event, whose step
rate() would miss otherwise. These are all 28 series of a model."""
_REJECTIONS = ("validation", "not_found", "unavailable", "internal")
"""The same for requests that fail before it is clear which model they are for."""


def error_type(error: BaseException) -> str:
    """Return the label `error_type`, as modern Dynamo has it, for the HTTP status of an error."""
    status = status_of(error)
    return _ERROR_TYPES.get(status) or ("validation" if status < 500 else "internal")


class _TokenCounts:
    """The per-token metrics of a model, as plain numbers: a tenth of the cost of prometheus_client's objects."""

    __slots__ = ("itl_buckets", "itl_sum_s", "output")

    def __init__(self) -> None:
        self.output = 0
        self.itl_buckets = [0] * (len(_ITL_SECONDS) + 1)  # not cumulative; the last has no limit
        self.itl_sum_s = 0.0


class _TokenCollector(Collector):
    def __init__(self) -> None:
        self.models: dict[str, _TokenCounts] = {}

    def of(self, model: str) -> _TokenCounts:
        found = self.models.get(model)
        if found is None:
            found = self.models[model] = _TokenCounts()
        return found

    def collect(self) -> Iterable[Metric]:
        itl = HistogramMetricFamily(
            "dynamo_frontend_inter_token_latency_seconds", "Time between two tokens of a stream.", labels=["model"]
        )
        output = CounterMetricFamily("dynamo_frontend_output_tokens", "Output tokens, as they come.", labels=["model"])
        for model, tokens in self.models.items():
            limits = [*map(str, map(float, _ITL_SECONDS)), "+Inf"]
            itl.add_metric([model], list(zip(limits, accumulate(tokens.itl_buckets), strict=True)), tokens.itl_sum_s)
            output.add_metric([model], tokens.output)
        yield itl
        yield output


class _SeriesOfServedModels(Collector):
    """Creates the series of every model that can answer, before the other metrics are collected; has none itself."""

    def __init__(self, metrics: FrontendMetrics, models: Callable[[], Iterable[str]]) -> None:
        self._metrics = metrics
        self._models = models

    def collect(self) -> Iterable[Metric]:
        for model in self._models():
            self._metrics.of(model)
        return ()


class FrontendMetrics:
    """All metrics of one server, in a registry of its own. Times in seconds, lengths in tokens."""

    def __init__(self, models: Callable[[], Iterable[str]]) -> None:
        """`models` returns the names of those that can answer now."""
        self.registry = CollectorRegistry()
        self.registry.register(_SeriesOfServedModels(self, models))
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
        for endpoint, error in product(ENDPOINTS, _REJECTIONS):
            self._rejected(endpoint, error)  # creates the series

    def of(self, model: str) -> ModelMetrics:
        """Return the metrics of one model. They are kept, since looking up labels for each request would cost 12 µs."""
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = ModelMetrics(self, model)
        return found

    def count_rejected(self, endpoint: str, error: BaseException) -> None:
        """Count a request that failed before it was clear which model it is for."""
        self._rejected(endpoint, error_type(error)).inc()

    def _rejected(self, endpoint: str, error: str) -> Counter:
        return self.requests.labels("", endpoint, "unary", "error", error)

    def exposition(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus text, and its content type."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class ModelMetrics:
    """`FrontendMetrics` with the model's label filled in."""

    def __init__(self, metrics: FrontendMetrics, model: str) -> None:
        self.name = model
        self.in_flight = metrics.in_flight.labels(model)
        self.queued = metrics.queued.labels(model)
        self.duration = metrics.duration.labels(model)
        self.ttft = metrics.ttft.labels(model)
        self.isl = metrics.isl.labels(model)
        self.osl = metrics.osl.labels(model)
        self.cached = metrics.cached.labels(model)
        self.tokens = metrics.tokens.of(model)
        self._metrics = metrics
        self._requests: dict[tuple[str, ...], Counter] = {}
        for endpoint, kind, (outcome, error) in product(ENDPOINTS, ("stream", "unary"), _OUTCOMES):
            self._counter(endpoint, kind, outcome, error)  # creates the series

    def count(self, endpoint: str, kind: str, outcome: Outcome, error: str) -> None:
        """Count a request that has ended. `kind` is stream or unary, `error` its error_type, empty without an error."""
        self._counter(endpoint, kind, outcome, error).inc()

    def _counter(self, endpoint: str, kind: str, outcome: Outcome, error: str) -> Counter:
        labels = (self.name, endpoint, kind, outcome, error)
        found = self._requests.get(labels)
        if found is None:
            found = self._requests[labels] = self._metrics.requests.labels(*labels)
        return found


class RequestTracker:
    """Times and counts of one request, from when it is accepted until `finish`."""

    __slots__ = ("_counts", "_endpoint", "_finished", "_first_token_at", "_is_stream", "_metrics", "_model", "_started_at",
                 "last_token_at")  # fmt: skip

    def __init__(self, metrics: FrontendMetrics, model: str, endpoint: str, *, stream: bool, started_at: float) -> None:
        """`started_at`: `time.monotonic()` when the request arrived."""
        self._metrics = metrics
        self._model = metrics.of(model)
        self._counts = self._model.tokens
        self._endpoint = endpoint
        self._is_stream = stream
        self._started_at = started_at
        self._first_token_at = 0.0
        self.last_token_at = 0.0  # time.monotonic(); 0 before the first token
        self._finished = False
        self._model.in_flight.inc()
        self._model.queued.inc()

    def on_tokens(self, count: int) -> None:
        """Count tokens that have arrived together."""
        if not count:
            return
        now = time.monotonic()
        counts = self._counts
        counts.output += count
        if not self._first_token_at:
            self._first_token_at = now
            self._model.queued.dec()
            if self._is_stream:
                self._model.ttft.observe(now - self._started_at)
        elif self._is_stream:
            since_last_s = now - self.last_token_at
            counts.itl_buckets[bisect_left(_ITL_SECONDS, since_last_s / count)] += count
            counts.itl_sum_s += since_last_s
        self.last_token_at = now

    def finish(
        self,
        outcome: Outcome,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        error: BaseException | None = None,
    ) -> None:
        """Record and log the end of the request; only the first call counts. `error` belongs to the outcome "error"."""
        if self._finished:
            return
        self._finished = True
        model = self._model
        duration_s = time.monotonic() - self._started_at
        kind = "stream" if self._is_stream else "unary"
        model.in_flight.dec()
        model.count(self._endpoint, kind, outcome, "" if error is None else error_type(error))
        if outcome == "success":
            model.duration.observe(duration_s)
        ttft_s = self._first_token_at - self._started_at if self._is_stream and self._first_token_at else None
        log_completed(
            CompletedRequest(
                endpoint=self._endpoint,
                model=model.name,
                stream=self._is_stream,
                outcome=outcome,
                error=error,
                duration_s=duration_s,
                ttft_s=ttft_s,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                output_tokens=output_tokens,
            )
        )
        if outcome == "disconnect":
            self._metrics.disconnected.inc()
        if not self._first_token_at:
            model.queued.dec()
            return
        model.isl.observe(prompt_tokens)
        model.osl.observe(output_tokens)
        model.cached.observe(cached_tokens)

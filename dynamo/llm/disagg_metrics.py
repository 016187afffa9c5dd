"""Prometheus metrics of disaggregated prefill."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


class DecodeMetrics:
    """Metrics of a decode worker.

    `reason` of a local prefill: short, queue (too many tasks wait), no-worker, request (it has several choices or asks for
    logprobs of the prompt), timeout or failed.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._remote = Counter(
            "dynamo_disagg_remote_prefills", "Prompts computed by a prefill worker.", registry=registry
        )
        self._tokens = Counter(
            "dynamo_disagg_remote_prefill_tokens",
            "Tokens of the prompts computed by a prefill worker.",
            registry=registry,
        )
        self._local = Counter(
            "dynamo_disagg_local_prefills",
            "Prompts computed by the decode worker although remote prefill is enabled.",
            ["reason"],
            registry=registry,
        )
        self._failures = Counter(
            "dynamo_disagg_failures",
            "Remote prefills that failed or timed out.",
            registry=registry,
        )
        self._wait = Histogram(
            "dynamo_disagg_prefill_seconds",
            "Time from the decision to the prefill worker's answer, with the wait in the queue.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._transfer = Histogram(
            "dynamo_disagg_transfer_seconds",
            "Time from the prefill worker's answer to the first token: the KV transfer and a step.",
            buckets=_SECONDS,
            registry=registry,
        )

    def remote(self, tokens: int, seconds: float) -> None:
        """Count a prompt that a prefill worker computed."""
        self._remote.inc()
        self._tokens.inc(tokens)
        self._wait.observe(seconds)

    def local(self, reason: str) -> None:
        """Count a prompt that is computed here."""
        self._local.labels(reason).inc()
        if reason in ("timeout", "failed"):
            self._failures.inc()

    def transferred(self, seconds: float) -> None:
        """Record the time of a KV transfer."""
        self._transfer.observe(seconds)


class PrefillMetrics:
    """Metrics of a prefill worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.waiting = Gauge(
            "dynamo_prefill_queue_waiting",
            "Tasks that no prefill worker has taken; all prefill workers report the same number.",
            registry=registry,
        )
        self.in_hand = Gauge("dynamo_prefill_tasks_in_hand", "Tasks taken and not completed.", registry=registry)
        self.done = Counter("dynamo_prefill_tasks", "Prompts computed for decode workers.", registry=registry)
        self.unwanted = Counter(
            "dynamo_prefill_tasks_unwanted", "Tasks whose decode worker declined or did not answer.", registry=registry
        )
        self.failed = Counter("dynamo_prefill_tasks_failed", "Tasks that failed or were cancelled.", registry=registry)
        self.tokens = Counter("dynamo_prefill_tokens", "Prompt tokens computed for decode workers.", registry=registry)

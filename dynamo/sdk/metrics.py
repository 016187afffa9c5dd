"""Metrics of a component's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo.sdk.context import service_context

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def metrics_registry() -> CollectorRegistry:
    """Where a component's Prometheus metrics go: `Counter("answers", "Answers given.", registry=metrics_registry())`.

    The Frontend's /metrics shows them with the labels `service` and `worker_id`. In a served process it is one registry;
    in plain Python, as in a test, a new one at each call, so that components can be made again and again.
    """
    context = service_context()
    if context is not None:
        found: CollectorRegistry = context.runtime.metrics.registry
        return found
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()

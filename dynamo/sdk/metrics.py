"""`metrics_registry()`: Prometheus metrics of a component."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo.sdk.context import service_context

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


def metrics_registry() -> CollectorRegistry:
    """Return the registry for a component's metrics: `Counter("answers", "Answers sent.", registry=metrics_registry())`.

    The Frontend's /metrics exports them with the labels `service` and `worker_id`. A served process has one registry; in
    plain Python, as in a test, each call returns a new one, so that components can be constructed repeatedly.
    """
    context = service_context()
    if context is not None:
        found: CollectorRegistry = context.runtime.metrics.registry
        return found
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()

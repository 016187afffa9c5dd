"""`dynamo.planner.prometheus` of ai-dynamo 0.2 and 0.3."""

from dynamo.compat.sla_planner import Prometheus

__all__ = ["Prometheus"]

"""`dynamo.planner.planner_sla` of ai-dynamo 0.2 and 0.3."""

from dynamo.compat.sla_planner import Planner

__all__ = ["Planner"]

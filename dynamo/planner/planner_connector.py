"""`dynamo.planner.planner_connector` of ai-dynamo 0.2 and 0.3."""

from dynamo.compat.planner import PlannerConnector

__all__ = ["PlannerConnector"]

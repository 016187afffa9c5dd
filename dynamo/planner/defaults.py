"""`dynamo.planner.defaults` of ai-dynamo 0.2 and 0.3."""

from dynamo.compat.planner import (
    WORKER_COMPONENT_NAMES,
    BasePlannerDefaults,
    LoadPlannerDefaults,
    PlannerDefaults,
    SLAPlannerDefaults,
    VllmV0ComponentName,
    VllmV1ComponentName,
)

__all__ = [
    "WORKER_COMPONENT_NAMES",
    "BasePlannerDefaults",
    "LoadPlannerDefaults",
    "PlannerDefaults",
    "SLAPlannerDefaults",
    "VllmV0ComponentName",
    "VllmV1ComponentName",
]

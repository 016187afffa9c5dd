"""How many workers a graph needs, and the change of their number while it runs.

Names that ai-dynamo 0.2 and 0.3 had here, such as `LocalConnector`, come from `dynamo.compat.planner`.
"""

from __future__ import annotations

from typing import Any

NAMES_OF_0_3 = (
    "KubernetesConnector",
    "LoadPlannerDefaults",
    "LocalConnector",
    "PlannerConnector",
    "PlannerDefaults",
    "SLAPlannerDefaults",
)


def __getattr__(name: str) -> Any:
    if name not in NAMES_OF_0_3:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dynamo.compat import planner

    return getattr(planner, name)

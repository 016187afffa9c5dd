"""`dynamo.planner.kubernetes_connector` of ai-dynamo 0.2 and 0.3."""

from dynamo.compat.planner import KubernetesConnector

__all__ = ["KubernetesConnector"]

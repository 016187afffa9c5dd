"""`from dynamo.sdk.core.protocol.deployment import Env`, as in ai-dynamo 0.3."""

from dynamo.compat.declarations import Env

__all__ = ["Env"]

"""`from dynamo.sdk.lib.service import service`, as in ai-dynamo 0.1 and 0.2."""

from dynamo.sdk.core.protocol.interface import LinkedServices
from dynamo.sdk.service import service

__all__ = ["LinkedServices", "service"]

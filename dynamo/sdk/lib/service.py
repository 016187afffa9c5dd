"""`from dynamo.sdk.lib.service import service`, as in ai-dynamo 0.1 and 0.2."""

from dynamo.compat.declarations import DynamoConfig, LeaseConfig, LinkedServices
from dynamo.sdk.service import service

__all__ = ["DynamoConfig", "LeaseConfig", "LinkedServices", "service"]

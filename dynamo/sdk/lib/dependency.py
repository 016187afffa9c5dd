"""`from dynamo.sdk.lib.dependency import depends`, as in ai-dynamo 0.1 and 0.2."""

from dynamo.compat.declarations import DynamoClient, DynamoDependency
from dynamo.sdk.depends import depends

__all__ = ["DynamoClient", "DynamoDependency", "depends"]

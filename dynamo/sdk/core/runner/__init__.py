"""`from dynamo.sdk.core.runner import TargetEnum`, as scripts of ai-dynamo 0.3 write it."""

from enum import Enum


class TargetEnum(Enum):
    """Where a graph runs; only one target exists."""

    DYNAMO = "dynamo"

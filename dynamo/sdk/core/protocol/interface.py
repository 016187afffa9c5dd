"""Names that components of ai-dynamo 0.2 and 0.3 import from `dynamo.sdk.core.protocol.interface`."""

from __future__ import annotations

from enum import StrEnum

from dynamo.sdk.api import DynamoTransport
from dynamo.sdk.service import AbstractService

__all__ = ["AbstractDynamoService", "AbstractService", "ComponentType", "DynamoTransport", "LinkedServices"]

AbstractDynamoService = AbstractService


class ComponentType(StrEnum):
    """Values of `@service(dynamo={"component_type": ...})`."""

    PLANNER = "planner"


class LinkedServices:
    """No-op, kept for ai-dynamo 0.3: a graph leaves out unlinked services by itself."""

    @staticmethod
    def remove_unused_edges() -> None:
        """Do nothing: `.dependencies` of a service already shows only what is linked."""

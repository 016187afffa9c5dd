"""Names that components of ai-dynamo 0.2 and 0.3 imported from `dynamo.sdk.core.protocol.interface`."""

from __future__ import annotations

from enum import StrEnum

from dynamo.sdk.api import DynamoTransport
from dynamo.sdk.service import AbstractService

__all__ = ["AbstractDynamoService", "AbstractService", "ComponentType", "DynamoTransport", "LinkedServices"]

AbstractDynamoService = AbstractService


class ComponentType(StrEnum):
    """What `@service(dynamo={"component_type": ...})` takes."""

    PLANNER = "planner"


class LinkedServices:
    """A graph leaves out what is not linked by itself, so that nothing is to be done here."""

    @staticmethod
    def remove_unused_edges() -> None:
        """Nothing: `.dependencies` of a service shows only what is linked, as soon as anything of it is."""

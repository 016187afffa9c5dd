"""Names that components and tests of ai-dynamo 0.2 and 0.3 import from `dynamo.sdk.core.protocol.interface`."""

from dynamo.compat.declarations import (
    AbstractDynamoService,
    AbstractService,
    ComponentType,
    DependencyInterface,
    DynamoConfig,
    DynamoEndpointInterface,
    DynamoTransport,
    KubernetesOverrides,
    LeaseConfig,
    LinkedServices,
    ResourceConfig,
    ServiceConfig,
    ServiceInterface,
)

__all__ = [
    "AbstractDynamoService",
    "AbstractService",
    "ComponentType",
    "DependencyInterface",
    "DynamoConfig",
    "DynamoEndpointInterface",
    "DynamoTransport",
    "KubernetesOverrides",
    "LeaseConfig",
    "LinkedServices",
    "ResourceConfig",
    "ServiceConfig",
    "ServiceInterface",
]

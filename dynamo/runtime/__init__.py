"""The `dynamo.runtime` binding of ai-dynamo 0.x: namespaces, components and endpoints without a graph.

Kept for code written for 0.1 to 0.3, over `dynamo.rpc`, which services of a graph use.
"""

from dynamo.runtime.component import Annotated, Component, ComponentClient, ComponentEndpoint, HandlerError, Namespace
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.worker import dynamo_endpoint, dynamo_worker

# their names in the 0.x binding
Client = ComponentClient
Endpoint = ComponentEndpoint

__all__ = [
    "Annotated",
    "Client",
    "Component",
    "ComponentClient",
    "ComponentEndpoint",
    "DistributedRuntime",
    "Endpoint",
    "HandlerError",
    "Namespace",
    "dynamo_endpoint",
    "dynamo_worker",
]

"""The `dynamo.runtime` binding of ai-dynamo 0.x: namespaces, components and endpoints without a graph.

Kept for code written for 0.1 to 0.3, over `dynamo.rpc`, which services of a graph use.
"""

from dynamo.runtime.cancellation import CancellationToken
from dynamo.runtime.component import Annotated, Component, ComponentClient, ComponentEndpoint, HandlerError, Namespace
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.etcd import EtcdClient, EtcdKvCache
from dynamo.runtime.nats_queue import NatsQueue
from dynamo.runtime.worker import dynamo_endpoint, dynamo_worker

# their names in the 0.x binding
Client = ComponentClient
Endpoint = ComponentEndpoint

__all__ = [
    "Annotated",
    "CancellationToken",
    "Client",
    "Component",
    "ComponentClient",
    "ComponentEndpoint",
    "DistributedRuntime",
    "Endpoint",
    "EtcdClient",
    "EtcdKvCache",
    "HandlerError",
    "Namespace",
    "NatsQueue",
    "dynamo_endpoint",
    "dynamo_worker",
]

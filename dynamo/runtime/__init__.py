"""How a call crosses processes: instances in etcd, requests and items over the stream plane."""

from dynamo.runtime.client import Client
from dynamo.runtime.component import Annotated, Component, ComponentClient, ComponentEndpoint, HandlerError, Namespace
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.worker import dynamo_endpoint, dynamo_worker

Endpoint = ComponentEndpoint  # its name in the 0.x binding

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

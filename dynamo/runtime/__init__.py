"""How a call crosses processes: instances in etcd, requests over NATS, items over the stream plane."""

from dynamo.runtime.client import Client
from dynamo.runtime.distributed import DistributedRuntime

__all__ = ["Client", "DistributedRuntime"]

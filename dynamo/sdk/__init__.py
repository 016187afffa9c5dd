"""What a service author imports. Pure declarations: importing this opens no socket and loads no engine."""

from dynamo.sdk.context import dynamo_context
from dynamo.sdk.depends import bind, depends, direct, instance_ids, random, round_robin
from dynamo.sdk.endpoint import async_on_shutdown, async_on_start, endpoint, liveness, on_shutdown, readiness
from dynamo.sdk.service import Service, service
from dynamo.wire.stream import Reply, Stream

dynamo_endpoint = endpoint  # names of ai-dynamo 0.1 and 0.2

__all__ = [
    "Reply",
    "Service",
    "Stream",
    "async_on_shutdown",
    "async_on_start",
    "bind",
    "depends",
    "direct",
    "dynamo_context",
    "dynamo_endpoint",
    "endpoint",
    "instance_ids",
    "liveness",
    "on_shutdown",
    "random",
    "readiness",
    "round_robin",
    "service",
]

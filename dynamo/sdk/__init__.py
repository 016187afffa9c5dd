"""What a service author imports. Pure declarations: importing this opens no socket and loads no engine."""

from dynamo.sdk.context import dynamo_context
from dynamo.sdk.depends import bind, depends, direct, instance_ids, random, round_robin
from dynamo.sdk.endpoint import async_on_shutdown, async_on_start, endpoint, liveness, on_shutdown, readiness
from dynamo.sdk.interface import abstract_endpoint
from dynamo.sdk.lib.config import ServiceConfig
from dynamo.sdk.lib.image import DYNAMO_IMAGE
from dynamo.sdk.lib.utils import get_capi_library_path
from dynamo.sdk.route import DynamoTransport, api
from dynamo.sdk.service import AbstractService, Service, service
from dynamo.wire.stream import Reply, Stream

# names of ai-dynamo 0.1 and 0.2
dynamo_endpoint = endpoint
dynamo_api = api
AbstractDynamoService = AbstractService
abstract_dynamo_endpoint = abstract_endpoint

__all__ = [
    "DYNAMO_IMAGE",
    "AbstractDynamoService",
    "AbstractService",
    "DynamoTransport",
    "Reply",
    "Service",
    "ServiceConfig",
    "Stream",
    "abstract_dynamo_endpoint",
    "abstract_endpoint",
    "api",
    "async_on_shutdown",
    "async_on_start",
    "bind",
    "depends",
    "direct",
    "dynamo_api",
    "dynamo_context",
    "dynamo_endpoint",
    "endpoint",
    "get_capi_library_path",
    "instance_ids",
    "liveness",
    "on_shutdown",
    "random",
    "readiness",
    "round_robin",
    "service",
]

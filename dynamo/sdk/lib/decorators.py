"""The decorators under the path that they had in ai-dynamo 0.1 to 0.3."""

from dynamo.sdk.api import DynamoTransport, api
from dynamo.sdk.endpoint import async_on_shutdown, async_on_start, endpoint, liveness, on_shutdown, readiness
from dynamo.sdk.interface import abstract_endpoint
from dynamo.sdk.service import AbstractService

dynamo_endpoint, dynamo_api = endpoint, api
AbstractDynamoService, abstract_dynamo_endpoint = AbstractService, abstract_endpoint
async_onstart = async_on_start

__all__ = [
    "AbstractDynamoService",
    "AbstractService",
    "DynamoTransport",
    "abstract_dynamo_endpoint",
    "abstract_endpoint",
    "api",
    "async_on_shutdown",
    "async_on_start",
    "async_onstart",
    "dynamo_api",
    "dynamo_endpoint",
    "endpoint",
    "liveness",
    "on_shutdown",
    "readiness",
]

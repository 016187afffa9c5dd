"""The SDK for service authors. Declarations only: importing it opens no socket and loads no engine."""

from dynamo.sdk.api import DynamoTransport, api
from dynamo.sdk.channels import Job, Topic, WorkQueue
from dynamo.sdk.compat import (
    AbstractDynamoService,
    abstract_dynamo_endpoint,
    async_onstart,
    dynamo_api,
    dynamo_context,
    dynamo_endpoint,
    server_context,
)
from dynamo.sdk.context import ServiceContext, service_context
from dynamo.sdk.depends import (
    avoiding,
    bind,
    depends,
    direct,
    in_flight,
    instance_ids,
    is_linked,
    least_loaded,
    power_of_two,
    random,
    round_robin,
)
from dynamo.sdk.endpoint import async_on_shutdown, async_on_start, endpoint, liveness, on_shutdown, readiness
from dynamo.sdk.hooks import ServiceHooks
from dynamo.sdk.interface import abstract_endpoint
from dynamo.sdk.lib.config import ServiceConfig
from dynamo.sdk.lib.image import DYNAMO_IMAGE
from dynamo.sdk.lib.utils import get_capi_library_path
from dynamo.sdk.metrics import metrics_registry
from dynamo.sdk.service import AbstractService, Service, service
from dynamo.streams import Reply, Stream

__all__ = [
    "DYNAMO_IMAGE",
    "AbstractDynamoService",
    "AbstractService",
    "DynamoTransport",
    "Job",
    "Reply",
    "Service",
    "ServiceConfig",
    "ServiceContext",
    "ServiceHooks",
    "Stream",
    "Topic",
    "WorkQueue",
    "abstract_dynamo_endpoint",
    "abstract_endpoint",
    "api",
    "async_on_shutdown",
    "async_on_start",
    "async_onstart",
    "avoiding",
    "bind",
    "depends",
    "direct",
    "dynamo_api",
    "dynamo_context",
    "dynamo_endpoint",
    "endpoint",
    "get_capi_library_path",
    "in_flight",
    "instance_ids",
    "is_linked",
    "least_loaded",
    "liveness",
    "metrics_registry",
    "on_shutdown",
    "power_of_two",
    "random",
    "readiness",
    "round_robin",
    "server_context",
    "service",
    "service_context",
]

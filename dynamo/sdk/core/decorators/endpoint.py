"""`dynamo.sdk.core.decorators.endpoint` of ai-dynamo 0.3."""

from dynamo.compat.declarations import DynamoClient, DynamoEndpoint
from dynamo.sdk.api import api
from dynamo.sdk.endpoint import endpoint
from dynamo.sdk.interface import abstract_endpoint

dynamo_endpoint, dynamo_api, abstract_dynamo_endpoint = endpoint, api, abstract_endpoint

__all__ = [
    "DynamoClient",
    "DynamoEndpoint",
    "abstract_dynamo_endpoint",
    "abstract_endpoint",
    "api",
    "dynamo_api",
    "dynamo_endpoint",
    "endpoint",
]

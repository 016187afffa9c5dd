"""The names of `dynamo.llm` in ai-dynamo 0.1 to 0.3, which `dynamo/llm/__init__.py` loads when they are asked for."""

from dynamo.compat.http_service import HttpAsyncEngine, HttpError, HttpService
from dynamo.compat.registration import ModelType, RouterMode, register_llm

__all__ = [
    "HttpAsyncEngine",
    "HttpError",
    "HttpService",
    "ModelType",
    "RouterMode",
    "register_llm",
]

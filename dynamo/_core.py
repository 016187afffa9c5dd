"""`from dynamo._core import ...`, as code for ai-dynamo 0.1 to 0.3 has it: names of `dynamo.runtime` and `dynamo.llm`."""

from __future__ import annotations

from typing import Any

from dynamo.runtime import (
    CancellationToken,
    Client,
    Component,
    DistributedRuntime,
    Endpoint,
    EtcdClient,
    EtcdKvCache,
    Namespace,
    NatsQueue,
)
from dynamo.runtime.logging import log_message

__all__ = [
    "CancellationToken",
    "Client",
    "Component",
    "DistributedRuntime",
    "Endpoint",
    "EtcdClient",
    "EtcdKvCache",
    "Namespace",
    "NatsQueue",
    "log_message",
]


def __getattr__(name: str) -> Any:
    import dynamo.llm

    if not name.startswith("__") and hasattr(dynamo.llm, name):
        return getattr(dynamo.llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

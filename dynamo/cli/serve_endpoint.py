"""A worker in the foreground of a command: one endpoint and the card of its model, until Ctrl-C or SIGTERM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from dynamo.cli.serve_http import connections, until_stopped
from dynamo.errors import ConfigError
from dynamo.llm.protocol import ModelCard, model_key

SCHEME = "dyn://"
DRAIN_S = 25.0
PARTS = ("dynamo", "backend", "generate")


def parse_address(text: str) -> tuple[str, str, str]:
    """Return namespace, component and endpoint of `dyn://...`; missing parts are those of dynamo.backend.generate."""
    words = text.removeprefix(SCHEME).split(".")
    if not text.startswith(SCHEME) or len(words) > len(PARTS) or not all(words):
        raise ConfigError(f"in={text}: not an endpoint", hint="write in=dyn://namespace.component.endpoint")
    namespace, component, endpoint = [*words, *PARTS[len(words) :]]
    return namespace, component, endpoint


async def serve_endpoint(
    card: ModelCard,
    handler: Callable[[Any], Any],
    request_type: Any = Any,
    check_health: Callable[[], Awaitable[Any]] | None = None,
) -> int:
    """Serve a model as long as `until_stopped` says; return the exit code.

    Raises TransportError if etcd or NATS cannot be reached.
    """
    runtime = connections("worker")
    try:
        await runtime.serve(card.namespace, card.component, card.endpoint, handler, request_type)
        await runtime.publish(model_key(card.name, runtime.instance_id), card)
        print(f"ready: {card.name} at {SCHEME}{card.namespace}.{card.component}.{card.endpoint}", flush=True)
        code = await until_stopped(check_health, runtime)
        await runtime.drain(DRAIN_S)
        return code
    finally:
        await runtime.close()

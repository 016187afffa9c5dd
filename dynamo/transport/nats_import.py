"""nats-py, imported without aiohttp.

It imports that where it happens to be installed, as with vLLM, for NATS over WebSockets: 0.15 s of the start of every
process. It gets it only where NATS_SERVER names a WebSocket.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Importing it fails, unless it has been imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


_websockets = os.environ.get("NATS_SERVER", "").startswith(("ws://", "wss://"))
with nullcontext() if _websockets else _without("aiohttp"):
    import nats.errors as errors
    from nats.aio.client import Client as NatsConnection
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

__all__ = ["Msg", "NatsConnection", "Subscription", "errors"]

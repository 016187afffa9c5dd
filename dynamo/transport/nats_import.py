"""The names of nats-py that are used, imported without aiohttp.

nats-py imports aiohttp, if it is installed (as with vLLM), for NATS over WebSockets: 0.15 s of the start of every process.
Here it is imported only if NATS_SERVER names a WebSocket.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Make imports of a package fail, unless it has been imported already."""
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
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

REFUSALS = ("authorization violation", "user authentication", "account authentication")
"""How the server's errors on credentials begin."""


class NatsConnection(Client):
    """A connection that reconnects, too, after the server has ended it for its credentials: these may be renewed.

    nats-py gives it up for good then.
    """

    async def _process_err(self, err_msg: str) -> None:
        if self.is_connected and err_msg.strip(" '").lower().startswith(REFUSALS):
            await self._process_op_err(errors.Error(f"nats: {err_msg}"))
        else:
            await super()._process_err(err_msg)


__all__ = ["Msg", "NatsConnection", "Subscription", "errors"]

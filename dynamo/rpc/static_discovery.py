"""Static endpoints: one instance, at an address that never changes, without etcd.

Requests go to the subject `<ns>_<component>.<endpoint>`. The instance itself answers on `<subject>.instance`, over NATS,
with what etcd has of other instances: where its RPC listener is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from dynamo.errors import TransportError, UnavailableError
from dynamo.rpc.messages import Instance, InstanceId
from dynamo.transport.nats import Nats

LOOKUP_INTERVAL_S = 0.5
LOOKUP_TIMEOUT_S = 1.0

_decode = msgspec.json.Decoder(Instance).decode


def static_subject(namespace: str, component: str, endpoint: str) -> str:
    """Return the NATS subject of a static endpoint's requests."""
    return f"{namespace}_{component.lower()}.{endpoint}"


async def serve_lookups(nats: Nats, instance: Instance) -> None:
    """Answer the lookups of `StaticDiscovery` with this instance, from now on."""
    answer = msgspec.json.encode(instance)

    async def handle(_: str, data: bytes, respond: Callable[[bytes], Awaitable[None]]) -> None:
        await respond(answer)

    await nats.subscribe(f"{instance.subject}.instance", handle)


class StaticDiscovery:
    """`Discovery` of a static endpoint: looks its instance up, and again, in case another one took its place."""

    def __init__(
        self,
        nats: Nats,
        address: tuple[str, str, str],
        on_join: Callable[[Instance], None],
        on_leave: Callable[[InstanceId], None],
    ) -> None:
        self._nats = nats
        self._lookup_subject = f"{static_subject(*address)}.instance"
        self._on_join = on_join
        self._on_leave = on_leave
        self._current: InstanceId | None = None

    async def run(self) -> None:
        """Follow the instance until cancelled."""
        while True:
            try:
                found = _decode(await self._nats.request(self._lookup_subject, b"", LOOKUP_TIMEOUT_S))
            except (TransportError, UnavailableError, msgspec.MsgspecError):
                pass  # not started yet, NATS is down, or the instance has ended: then its connection is lost too
            else:
                if found.id != self._current:
                    if self._current is not None:
                        self._on_leave(self._current)
                    self._current = found.id
                    self._on_join(found)
            await asyncio.sleep(LOOKUP_INTERVAL_S)

"""Static endpoints: one instance, at an address that never changes, without etcd.

Requests go to the subject `<ns>_<component>.<endpoint>`. Where the stream connection is opened to, which etcd tells of
other instances, the instance itself tells on `<subject>.instance`, over NATS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from dynamo.errors import TransportError, UnavailableError
from dynamo.rpc.messages import Instance, InstanceId
from dynamo.transport.nats import Nats

ASK_EVERY_S = 0.5
ASK_TIMEOUT_S = 1.0

_decode = msgspec.json.Decoder(Instance).decode


def static_subject(namespace: str, component: str, endpoint: str) -> str:
    return f"{namespace}_{component.lower()}.{endpoint}"


async def tell(nats: Nats, instance: Instance) -> None:
    """Answer, from now on, those who ask where this instance is."""
    answer = msgspec.json.encode(instance)

    async def handle(_: str, data: bytes, respond: Callable[[bytes], object]) -> None:
        await respond(answer)  # type: ignore[misc]

    await nats.subscribe(f"{instance.subject}.instance", handle)


class StaticDiscovery:
    """`Discovery` of a static endpoint: asks the instance itself, and again, in case another one took its place."""

    def __init__(
        self,
        nats: Nats,
        address: tuple[str, str, str],
        on_join: Callable[[Instance], None],
        on_leave: Callable[[InstanceId], None],
    ) -> None:
        self._nats, self._subject = nats, f"{static_subject(*address)}.instance"
        self._on_join, self._on_leave = on_join, on_leave
        self._known: InstanceId | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                found = _decode(await self._nats.request(self._subject, b"", ASK_TIMEOUT_S))
            except (TransportError, UnavailableError, msgspec.MsgspecError):
                pass  # nobody is there yet, NATS is away, or the instance has gone: its connection tells that
            else:
                if found.id != self._known:
                    if self._known is not None:
                        self._on_leave(self._known)
                    self._known = found.id
                    self._on_join(found)
            await asyncio.sleep(ASK_EVERY_S)

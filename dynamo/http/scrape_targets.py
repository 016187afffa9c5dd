"""Where Prometheus finds the hosts of all graphs that share an etcd: `metrics/<lease hex>`, a key of each process."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import msgspec

from dynamo.errors import TransportError
from dynamo.transport.network import METRICS_ADDRESS

if TYPE_CHECKING:
    from dynamo.rpc.runtime import Runtime

log = logging.getLogger(__name__)

PREFIX = "metrics/"
LOOK_S = 1.0


class ScrapeTargets:
    """`publish` tells others of this process's host, `addresses` gives those of all."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._own = runtime, os.environ.get(METRICS_ADDRESS, "")
        self._known: set[str] = set()

    async def publish(self) -> None:
        """Once the runtime is connected; the key goes with its lease. Nothing where no metrics port is."""
        if not self._own or self._runtime.is_static:
            return
        try:
            await self._runtime.publish(f"{PREFIX}{self._runtime.instance_id:x}", self._own)
        except TransportError as error:  # it is registered when etcd is back
            log.debug("metrics port not published: %s", error.message)

    async def addresses(self) -> list[str]:
        """`host:port` of each host, this one among them; the last ones known while etcd is away."""
        etcd = self._runtime.etcd_client()
        if etcd is not None:
            try:
                items, _ = await etcd.get_prefix(PREFIX, timeout_s=LOOK_S)
                self._known = set(filter(None, (_address(item.value) for item in items)))
            except TransportError as error:
                log.debug("the hosts that were known are told again: %s", error.message)
        return sorted({*self._known, self._own} - {""})


def _address(value: bytes) -> str:
    """Empty for what is no address: it would make Prometheus drop the whole list."""
    try:
        found = msgspec.json.decode(value, type=str)
    except msgspec.MsgspecError:
        return ""
    host, _, port = found.rpartition(":")
    return found if host and port.isdecimal() and not set(found) & set("/ \t\n") else ""

"""Scrape targets of all hosts whose graphs share an etcd: each process has a key `metrics/<lease hex>` there."""

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
READ_TIMEOUT_S = 1.0


class ScrapeTargets:
    """Publishes the metrics address of this process's host, and reads those of all hosts."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._own = os.environ.get(METRICS_ADDRESS, "")
        self._known: set[str] = set()

    async def publish(self) -> None:
        """Publish this host's address under the runtime's lease. No-op without a metrics port, or without etcd.

        To be called once the runtime is connected.
        """
        if not self._own or self._runtime.is_static:
            return
        try:
            await self._runtime.publish(f"{PREFIX}{self._runtime.instance_id:x}", self._own)
        except TransportError as error:  # the runtime registers it again when etcd is back
            log.debug("metrics port not published: %s", error.message)

    async def addresses(self) -> list[str]:
        """Return `host:port` of each host, including this one; the last known ones while etcd is unavailable."""
        etcd = self._runtime.etcd_client()
        if etcd is not None:
            try:
                items, _ = await etcd.get_prefix(PREFIX, timeout_s=READ_TIMEOUT_S)
                self._known = set(filter(None, (_address(item.value) for item in items)))
            except TransportError as error:
                log.debug("etcd is unavailable, using the last known hosts: %s", error.message)
        return sorted({*self._known, self._own} - {""})


def _address(value: bytes) -> str:
    """Return the address in a key's value; empty if it is malformed, which would make Prometheus drop the whole list."""
    try:
        found = msgspec.json.decode(value, type=str)
    except msgspec.MsgspecError:
        return ""
    host, _, port = found.rpartition(":")
    return found if host and port.isdecimal() and not set(found) & set("/ \t\n") else ""

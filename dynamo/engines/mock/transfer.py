"""KV that goes from one mock engine to another: the blocks wait at the engine that has computed them until one fetches them.

A fetch is a TCP connection that names what it wants, is told whether it is there, and is closed when the modelled time
of the transfer is over. So the lender knows when its blocks are free again, the other one when the lender is gone, and
either may be killed at any moment.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from dynamo.errors import ConfigError, EngineError, TransportError
from dynamo.transport.network import advertised_host, bound_host, listening_socket

FETCH_TIMEOUT_S = 2.0
"""to connect and to be told"""
_THERE, _GONE = b"there\n", b"gone\n"


class KvPlace(msgspec.Struct):
    """Where KV waits: a request's `kv_transfer`."""

    host: str
    port: int
    name: str
    cached_tokens: int
    """of the prompt, which the lender had in its prefix cache"""


class KvLender:
    """Keeps KV for others, each for `lease_s` seconds at most before somebody begins to fetch it."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self.expired = 0
        """how many nobody began to fetch in time"""
        self._kept: dict[str, tuple[Callable[[], None], asyncio.TimerHandle]] = {}
        self._server: asyncio.Server | None = None
        self._takers: set[asyncio.StreamWriter] = set()
        self._opening = asyncio.Lock()
        self._host = ""

    def __len__(self) -> int:
        return len(self._kept)

    async def open(self) -> None:
        """Listen, unless it does so already."""
        async with self._opening:
            if self._server is None:
                nats_url = os.environ.get("NATS_SERVER", "")
                try:
                    listener = listening_socket(bound_host(nats_url))
                except (ConfigError, TransportError) as error:
                    raise EngineError(f"the mock engine cannot lend KV: {error.message}", hint=error.hint) from None
                self._server = await asyncio.start_server(self._lend, sock=listener)
                self._host = advertised_host(nats_url)  # looked up once: it may ask a name server

    def keep(self, name: str, free: Callable[[], None]) -> None:
        """`free` is called once: when the KV was fetched, dropped, or its lease is over."""
        self._kept[name] = free, asyncio.get_running_loop().call_later(self._lease_s, self._expire, name)

    def _expire(self, name: str) -> None:
        self.expired += 1
        self.drop(name)

    def drop(self, name: str) -> None:
        if name in self._kept:
            free, lease = self._kept.pop(name)
            lease.cancel()
            free()

    def place(self, name: str, cached_tokens: int) -> dict[str, Any]:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        found: dict[str, Any] = msgspec.to_builtins(KvPlace(self._host, port, name, cached_tokens))
        return found

    async def _lend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        free: Callable[[], None] | None = None
        self._takers.add(writer)
        try:
            name = (await reader.readline()).decode(errors="replace").strip()
            if name in self._kept:
                free, lease = self._kept.pop(name)
                lease.cancel()
            writer.write(_GONE if free is None else _THERE)
            await reader.read()  # until the other end closes
        except OSError:
            pass
        finally:
            if free is not None:
                free()
            self._takers.discard(writer)
            writer.close()

    async def close(self) -> None:
        for name in list(self._kept):
            self.drop(name)
        if self._server is not None:
            self._server.close()
        for writer in self._takers:
            writer.close()


async def fetch(place: KvPlace, seconds: float) -> None:
    """Returns when the transfer, which takes so long, is done: the lender has freed the KV, or is about to.

    Raises EngineError when it is not there, or the lender goes away meanwhile.
    """
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(place.host, place.port)
    except (OSError, TimeoutError) as error:
        raise _not_fetched(place, repr(error)) from None
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            writer.write(f"{place.name}\n".encode())
            answer = await reader.readline()
        if answer != _THERE:
            raise _not_fetched(place, "it is not there any more")
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await reader.read(1)
                raise _not_fetched(place, "the lender has gone")
    except (OSError, TimeoutError) as error:
        raise _not_fetched(place, repr(error)) from None
    finally:
        writer.close()


def _not_fetched(place: KvPlace, reason: str) -> EngineError:
    return EngineError(f"KV not fetched from {place.host}:{place.port}: {reason}")

"""KV transfer between mock engines: a server keeps the blocks of computed prompts until another engine fetches them.

A fetch is a TCP connection: the client names the KV, the server answers whether it has it, and the client closes the
connection when the modelled time of the transfer is over. So the server knows when its blocks are free again, the client
notices when the server is lost, and either process may be killed at any moment.
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
"""for the connection, and for the server's answer"""
_AVAILABLE = b"available\n"
_UNAVAILABLE = b"unavailable\n"


class KvSource(msgspec.Struct):
    """Address of a prompt's KV: the `kv_transfer` of a request."""

    host: str
    port: int
    name: str
    cached_tokens: int
    """prompt tokens that the engine which computed it had in its prefix cache"""


class KvLeaseServer:
    """Keeps KV for other engines, each prompt's for at most `lease_s` seconds until a fetch begins."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self.expired = 0
        """leases that ended before a fetch began"""
        self._leases: dict[str, tuple[Callable[[], None], asyncio.TimerHandle]] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._opening = asyncio.Lock()
        self._host = ""

    def __len__(self) -> int:
        return len(self._leases)

    async def open(self) -> None:
        """Start listening; no-op if it listens already. Raises EngineError if no port can be opened."""
        async with self._opening:
            if self._server is None:
                nats_url = os.environ.get("NATS_SERVER", "")
                try:
                    listener = listening_socket(bound_host(nats_url))
                except (ConfigError, TransportError) as error:
                    raise EngineError(
                        f"the mock engine cannot serve KV to others: {error.message}", hint=error.hint
                    ) from None
                self._server = await asyncio.start_server(self._serve, sock=listener)
                self._host = advertised_host(nats_url)  # resolved once: it may query a name server

    def lease(self, name: str, free: Callable[[], None]) -> None:
        """Keep KV under `name`. `free` is called once: when it was fetched or released, or the lease has expired."""
        self._leases[name] = free, asyncio.get_running_loop().call_later(self._lease_s, self._expire, name)

    def _expire(self, name: str) -> None:
        self.expired += 1
        self.release(name)

    def release(self, name: str) -> None:
        """End a lease and free its KV; no-op if it has ended."""
        if name in self._leases:
            free, timer = self._leases.pop(name)
            timer.cancel()
            free()

    def source(self, name: str, cached_tokens: int) -> dict[str, Any]:
        """Return the `KvSource` of a lease as a dict, for `GenerateRequest.kv_transfer`."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        source: dict[str, Any] = msgspec.to_builtins(KvSource(self._host, port, name, cached_tokens))
        return source

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        free: Callable[[], None] | None = None
        self._connections.add(writer)
        try:
            name = (await reader.readline()).decode(errors="replace").strip()
            if name in self._leases:
                free, timer = self._leases.pop(name)
                timer.cancel()
            writer.write(_UNAVAILABLE if free is None else _AVAILABLE)
            await reader.read()  # until the client closes
        except OSError:
            pass
        finally:
            if free is not None:
                free()
            self._connections.discard(writer)
            writer.close()

    async def close(self) -> None:
        """End all leases and close all connections."""
        for name in list(self._leases):
            self.release(name)
        if self._server is not None:
            self._server.close()
        for writer in self._connections:
            writer.close()


async def fetch(source: KvSource, seconds: float) -> None:
    """Wait `seconds`, the modelled time of the transfer; then the server frees the KV.

    Raises EngineError if the server does not have the KV, or is lost in the meantime.
    """
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(source.host, source.port)
    except (OSError, TimeoutError) as error:
        raise _not_fetched(source, repr(error)) from None
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            writer.write(f"{source.name}\n".encode())
            answer = await reader.readline()
        if answer != _AVAILABLE:
            raise _not_fetched(source, "it is no longer available")
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await reader.read(1)
                raise _not_fetched(source, "the connection was lost")
    except (OSError, TimeoutError) as error:
        raise _not_fetched(source, repr(error)) from None
    finally:
        writer.close()


def _not_fetched(source: KvSource, reason: str) -> EngineError:
    return EngineError(f"KV not fetched from {source.host}:{source.port}: {reason}")

"""Write coalescing: what one turn of the event loop writes to a client leaves as one `send` system call.

The kernel's part of a `send` on loopback is 5 µs, more than all else that a token costs here.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class WriteCoalescer:
    """Flushes the transports that were written to, at the end of each turn of the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending: list[CoalescedTransport] = []

    def add(self, transport: CoalescedTransport) -> None:
        """Schedule a flush of this transport."""
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(transport)

    def _flush(self) -> None:
        pending = self._pending
        self._pending = []
        for transport in pending:
            transport.flush()


class CoalescedTransport:
    """A transport whose writes wait until the event loop has run what is ready; all else passes straight through."""

    __slots__ = ("_coalescer", "_parts", "_size", "_transport", "get_extra_info", "is_closing", "pause_reading",
                 "resume_reading")  # fmt: skip

    def __init__(self, transport: asyncio.Transport, coalescer: WriteCoalescer) -> None:
        self._transport = transport
        self._coalescer = coalescer
        self._parts: list[bytes] = []
        self._size = 0
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._coalescer.add(self)
        self._parts.append(data)
        self._size += len(data)

    def flush(self) -> None:
        parts = self._parts
        self._parts = []
        self._size = 0
        if parts and not self._transport.is_closing():
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def get_write_buffer_size(self) -> int:
        return self._size + self._transport.get_write_buffer_size()

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)


def protocol() -> type[HttpToolsProtocol]:
    """Return uvicorn's HTTP protocol class with coalesced writes, for one server on the running loop."""
    coalescer = WriteCoalescer()

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(cast(Any, CoalescedTransport(transport, coalescer)))

    return Protocol

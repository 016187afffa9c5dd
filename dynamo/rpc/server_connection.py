"""The callee's end of the stream plane: who is connected, and the streams that go out to them."""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dynamo import codec
from dynamo.rpc import frames
from dynamo.rpc.connection import Connection
from dynamo.rpc.messages import Request
from dynamo.rpc.remote_errors import Failure, pack
from dynamo.streams import CREDIT_BATCH

WINDOW_ITEMS = 4 * CREDIT_BATCH  # items a generator may be ahead of its reader
PAUSE_BYTES = 1 << 20  # written and not yet taken by the caller's process: generators wait above
MAX_UNREAD_BYTES = frames.MAX_FRAME_BYTES  # a caller that is this far behind is not reading
EARLY_CANCELS = 1024
HELLO_TIMEOUT_S = 2.0
MAX_HELLO_BYTES = 256
BODY_TIMEOUT_S = 60.0

_decode_sid = msgspec.msgpack.Decoder(int).decode
_decode_credit = msgspec.msgpack.Decoder(tuple[int, int]).decode
_decode_body = msgspec.msgpack.Decoder(tuple[int, bytes]).decode
_decode_hello = msgspec.msgpack.Decoder(tuple[str, str]).decode
_decode_request = msgspec.msgpack.Decoder(tuple[str, Request]).decode


class Outgoing:
    """One stream: `send` items, then `end`. Both do nothing once the caller has gone.

    `on_cancel` runs when the caller goes away first, or with the error when an item cannot be sent; `on_read(n)` when
    the caller has read n more items.
    """

    __slots__ = ("_ahead", "_connection", "_ready", "closed", "on_cancel", "on_read", "sid")

    def __init__(self, connection: ServerConnection, sid: int) -> None:
        self._connection, self.sid = connection, sid
        self.on_cancel: Callable[[Exception | None], None] | None = None
        self.on_read: Callable[[int], None] | None = None
        self.closed = False
        self._ahead = 0
        self._ready: asyncio.Event | None = None

    def send(self, item: Any) -> None:
        if self.closed:
            return
        connection = self._connection
        connection.sids.append(self.sid)
        connection.items.append(item)
        self._ahead += 1
        if not connection.scheduled:
            connection.schedule()

    def end(self, error: BaseException | None = None, where: str = "") -> None:
        if self.closed:
            return
        self.closed = True
        self._connection.ended(self.sid, None if error is None else pack(error, where))

    @property
    def full(self) -> bool:
        """The reader is `WINDOW_ITEMS` behind, or its process does not read at all."""
        return self._ahead >= WINDOW_ITEMS or self._connection.paused

    async def room(self) -> None:
        """Wait while `full`: what keeps a fast generator from filling memory."""
        while self.full and not self.closed:
            self._ready = asyncio.Event()
            await self._ready.wait()

    def wake(self) -> None:
        if self._ready is not None:
            self._ready.set()

    def credit(self, items: int) -> None:
        self._ahead -= items
        self.wake()
        if self.on_read is not None:
            self.on_read(items)

    def cancel(self, error: Exception | None = None) -> None:
        if self.closed:
            return
        self.closed = True
        self._connection.outgoing.pop(self.sid, None)
        self.wake()
        if self.on_cancel is not None:
            self.on_cancel(error)


class ServerConnection(Connection):
    """One caller's connection; `outgoing` are the streams that it is being sent."""

    def __init__(self, listener: StreamListener) -> None:
        super().__init__()
        self.id = ""
        self.outgoing: dict[int, Outgoing] = {}
        self.sids: list[int] = []
        self.items: list[Any] = []
        self.scheduled = self.paused = False
        self._reader.limit_bytes = MAX_HELLO_BYTES
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._accepted: list[int] = []
        self._ended: list[int] = []
        self._failed: list[tuple[int, Failure]] = []
        self._bodies: dict[int, asyncio.Future[bytes]] = {}
        self._early_cancels: dict[int, None] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(PAUSE_BYTES)
        self._listener.accepted.add(self)
        self._loop.call_later(HELLO_TIMEOUT_S, self._strange)

    def _strange(self) -> None:
        if not self.id:  # whoever it is
            self.abort()

    def open(self, sid: int) -> Outgoing:
        """A stream to that caller; closed already if it does not want it any more."""
        outgoing = Outgoing(self, sid)
        if not self.alive or sid in self._early_cancels or sid in self.outgoing:
            outgoing.closed = True
        else:
            self.outgoing[sid] = outgoing
        return outgoing

    def has_body(self, sid: int) -> bool:
        return sid in self._bodies and self._bodies[sid].done()

    async def body(self, sid: int) -> bytes | None:
        """The BODY frame of that stream, which may be still on its way; None if it does not come."""
        waiter = self._bodies.setdefault(sid, self._loop.create_future())
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await waiter
        except (TimeoutError, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None
        finally:
            self._bodies.pop(sid, None)

    # -- out

    def accept(self, sid: int) -> None:
        """Tell the caller that its request is being answered, ahead of what is sent now."""
        self._accepted.append(sid)
        self.schedule()

    def refuse(self, sid: int, failure: Failure) -> None:
        self.control(frames.REFUSE, (sid, failure))

    def schedule(self) -> None:
        if not self.scheduled:
            self.scheduled = True
            self._loop.call_soon(self.flush)

    def ended(self, sid: int, failure: Failure | None) -> None:
        self.outgoing.pop(sid, None)
        if failure is None:
            self._ended.append(sid)
        else:
            self._failed.append((sid, failure))
        self.schedule()

    def flush(self) -> None:
        """Write the outbox: items first, then what ended behind them."""
        self.scheduled = False
        transport = self.transport
        if transport is None:
            return
        out = b""
        if self._accepted:
            out = frames.pack(frames.ACCEPT, codec.encode(self._accepted))
            self._accepted = []
        if self.sids:
            sids, items = self.sids, self.items
            self.sids, self.items = [], []
            try:
                out += frames.pack(frames.DATA, codec.encode((sids, items)))
            except Exception:  # one item cannot be sent, or all are too much for one frame
                out += b"".join(self._one_by_one(sids, items))
        if self._ended:
            out += frames.pack(frames.END, codec.encode(self._ended))
            self._ended = []
        if self._failed:
            out += b"".join(frames.pack(frames.ERROR, codec.encode(failed)) for failed in self._failed)
            self._failed = []
        if out:
            transport.write(out)
        if self.paused and transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.abort()

    def _one_by_one(self, sids: list[int], items: list[Any]) -> list[bytes]:
        """A frame an item. A stream whose item cannot be sent fails there; the others do not."""
        out: list[bytes] = []
        broken: set[int] = set()
        for sid, item in zip(sids, items, strict=True):
            if sid in broken:
                continue
            try:
                out.append(frames.pack(frames.DATA, codec.encode(((sid,), (item,)))))
            except Exception as error:
                broken.add(sid)
                self._ended = [ended for ended in self._ended if ended != sid]
                outgoing = self.outgoing.get(sid)
                self.ended(sid, pack(error))
                if outgoing is not None:
                    outgoing.cancel(error)
        return out

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        for outgoing in self.outgoing.values():
            outgoing.wake()

    # -- in

    def _dispatch(self, kind: int, body: bytes | bytearray) -> None:
        if kind == frames.HELLO:
            if self.id:
                raise ValueError("HELLO came twice")
            name, key = _decode_hello(body)
            if not hmac.compare_digest(key.encode(), self._listener.key.encode()):
                raise ValueError("HELLO without the key of this process")
            self.id, self._reader.limit_bytes = name, frames.MAX_FRAME_BYTES
            self._listener.hello(self)
        elif not self.id:
            raise ValueError(f"frame of kind {kind} before HELLO")
        elif kind == frames.REQUEST:
            subject, request = _decode_request(body)
            self._listener.on_request(self, subject, request)
        elif kind == frames.CREDIT:
            sid, items = _decode_credit(body)
            if sid in self.outgoing:
                self.outgoing[sid].credit(items)
        elif kind == frames.CANCEL:
            self._cancel(_decode_sid(body))
        elif kind == frames.BODY:
            sid, data = _decode_body(body)
            waiter = self._bodies.setdefault(sid, self._loop.create_future())
            if not waiter.done():
                waiter.set_result(data)

    def _cancel(self, sid: int) -> None:
        waiter = self._bodies.pop(sid, None)
        if waiter is not None:
            waiter.cancel()
        if sid in self.outgoing:
            self.outgoing[sid].cancel()
            return
        # It may have overtaken its request, which took the way over NATS; or met the end of the stream on the way.
        self._early_cancels[sid] = None
        if len(self._early_cancels) > EARLY_CANCELS:
            del self._early_cancels[next(iter(self._early_cancels))]

    def _lost(self) -> None:
        self._listener.gone(self)
        for waiter in self._bodies.values():
            waiter.cancel()
        self._bodies.clear()
        for outgoing in list(self.outgoing.values()):
            outgoing.cancel()
        self.sids, self.items, self._accepted, self._ended, self._failed = [], [], [], [], []


class StreamListener:
    """Accepts connections from those who know its `key`, and finds them by the id that a request over NATS names.
    `on_request(connection, subject, request)` gets the other requests; it must not raise."""

    def __init__(self) -> None:
        self.key = secrets.token_hex(16)
        self.on_request: Callable[[ServerConnection, str, Request], None] = lambda connection, subject, request: None
        self.addresses: dict[str, str] = {}
        self.connections: dict[str, ServerConnection] = {}
        self.accepted: set[ServerConnection] = set()
        self._stopping = False
        self._hello = asyncio.Event()
        self._servers: list[asyncio.Server] = []  # uvloop closes a listening server that nobody refers to

    async def listen(self, *, unix: Path | None = None, tcp: tuple[str, int] | None = None) -> None:
        """Listen on a unix socket path, on TCP (port 0: any), or on both. `addresses` tells the outcome."""
        loop = asyncio.get_running_loop()
        if unix is not None:
            unix.unlink(missing_ok=True)
            self._servers.append(await loop.create_unix_server(lambda: ServerConnection(self), str(unix)))
            os.chmod(unix, 0o600)
            self.addresses["unix"] = str(unix)
        if tcp is not None:
            server = await loop.create_server(lambda: ServerConnection(self), tcp[0], tcp[1])
            self._servers.append(server)
            self.addresses["tcp"] = f"{tcp[0]}:{server.sockets[0].getsockname()[1]}"

    async def connection(self, connection_id: str) -> ServerConnection | None:
        """The connection of that id; a request may arrive before its HELLO. None when that does not come in time."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                while connection_id not in self.connections:
                    self._hello.clear()
                    await self._hello.wait()
        except TimeoutError:
            return None
        return self.connections[connection_id]

    def bye(self) -> None:
        """Tell every caller, later ones too, that no new request should come here."""
        self._stopping = True
        for connection in self.connections.values():
            connection.control(frames.BYE, None)

    def hello(self, connection: ServerConnection) -> None:
        self.connections[connection.id] = connection
        self._hello.set()
        if self._stopping:
            connection.control(frames.BYE, None)

    def gone(self, connection: ServerConnection) -> None:
        self.accepted.discard(connection)
        if self.connections.get(connection.id) is connection:
            del self.connections[connection.id]

    async def close(self) -> None:
        """Send what is in the outboxes, then close all connections."""
        for server in self._servers:
            server.close()
        for connection in list(self.accepted):
            connection.flush()
            connection.close()
        unix = self.addresses.get("unix")
        if unix is not None:
            Path(unix).unlink(missing_ok=True)

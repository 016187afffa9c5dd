"""The server's end of the RPC connections: the listener, its clients, and the streams that are sent to them."""

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
from dynamo.rpc.connection import MAX_UNREAD_BYTES, Connection
from dynamo.rpc.messages import Request
from dynamo.rpc.remote_errors import Failure, pack
from dynamo.streams import CREDIT_BATCH

WINDOW_ITEMS = 4 * CREDIT_BATCH
"""Items that a generator may be ahead of its reader."""
PAUSE_BYTES = 1 << 20
"""Written and not yet read by the client's process: generators wait above that."""
EARLY_CANCELS = 1024
HELLO_TIMEOUT_S = 2.0
MAX_HELLO_BYTES = 256
BODY_TIMEOUT_S = 60.0

_decode_sid = msgspec.msgpack.Decoder(int).decode
_decode_credit = msgspec.msgpack.Decoder(tuple[int, int]).decode
_decode_body = msgspec.msgpack.Decoder(tuple[int, bytes]).decode
_decode_hello = msgspec.msgpack.Decoder(tuple[str, str]).decode
_decode_request = msgspec.msgpack.Decoder(tuple[str, Request]).decode


class ServerStream:
    """One stream of items to a client: `send` them, then `end`. Both are no-ops once the client has cancelled.

    `on_cancel` is called with None when the client cancels or is lost first, and with the error when an item cannot be
    sent; `on_read(n)` when the client has read n more items.
    """

    __slots__ = ("_ahead", "_connection", "_writable", "closed", "on_cancel", "on_read", "sid")

    def __init__(self, connection: ServerConnection, sid: int) -> None:
        self._connection = connection
        self.sid = sid
        self.on_cancel: Callable[[Exception | None], None] | None = None
        self.on_read: Callable[[int], None] | None = None
        self.closed = False
        self._ahead = 0
        self._writable: asyncio.Event | None = None

    def send(self, item: Any) -> None:
        """Send an item with the connection's next DATA frame."""
        if self.closed:
            return
        connection = self._connection
        connection.pending_sids.append(self.sid)
        connection.pending_items.append(item)
        self._ahead += 1
        if not connection.flush_scheduled:
            connection.schedule_flush()

    def end(self, error: BaseException | None = None, where: str = "") -> None:
        """End the stream, behind its items; with `error`, which was raised in `where`, the client raises it."""
        if self.closed:
            return
        self.closed = True
        self._connection.end_stream(self.sid, None if error is None else pack(error, where))

    @property
    def full(self) -> bool:
        """True if the reader is `WINDOW_ITEMS` behind, or its process does not read at all."""
        return self._ahead >= WINDOW_ITEMS or self._connection.paused

    async def wait_until_writable(self) -> None:
        """Wait while `full`. This keeps a fast generator from filling memory."""
        while self.full and not self.closed:
            self._writable = asyncio.Event()
            await self._writable.wait()

    def wake(self) -> None:
        """Let `wait_until_writable` check again."""
        if self._writable is not None:
            self._writable.set()

    def credit(self, items: int) -> None:
        """Note that the client has read `items` more."""
        self._ahead -= items
        self.wake()
        if self.on_read is not None:
            self.on_read(items)

    def cancel(self, error: Exception | None = None) -> None:
        """Close the stream without an END frame and call `on_cancel(error)`. No-op if it is closed."""
        if self.closed:
            return
        self.closed = True
        self._connection.streams.pop(self.sid, None)
        self.wake()
        if self.on_cancel is not None:
            self.on_cancel(error)


class ServerConnection(Connection):
    """The connection of one client; `streams` are those that are being sent to it, by stream id."""

    def __init__(self, listener: StreamListener) -> None:
        super().__init__()
        self.id = ""
        """chosen by the client, in its HELLO; empty until then"""
        self.streams: dict[int, ServerStream] = {}
        self.pending_sids: list[int] = []
        """the stream of each of `pending_items`, which the next flush sends"""
        self.pending_items: list[Any] = []
        self.flush_scheduled = False
        self.paused = False
        self._reader.limit_bytes = MAX_HELLO_BYTES
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._pending_accepts: list[int] = []
        self._pending_ends: list[int] = []
        self._pending_errors: list[tuple[int, Failure]] = []
        self._bodies: dict[int, asyncio.Future[bytes]] = {}
        self._early_cancels: dict[int, None] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(PAUSE_BYTES)
        self._listener.accepted.add(self)
        self._loop.call_later(HELLO_TIMEOUT_S, self._check_hello)

    def _check_hello(self) -> None:
        if not self.id:
            self.abort()

    def open_stream(self, sid: int) -> ServerStream:
        """Open the stream that the client numbered `sid`. It is closed already if the client has cancelled it."""
        stream = ServerStream(self, sid)
        if not self.alive or sid in self._early_cancels or sid in self.streams:
            stream.closed = True
        else:
            self.streams[sid] = stream
        return stream

    def has_body(self, sid: int) -> bool:
        """Return True if the BODY frame of that stream has arrived."""
        return sid in self._bodies and self._bodies[sid].done()

    async def receive_body(self, sid: int) -> bytes | None:
        """Wait for the BODY frame of that stream. None if it was cancelled or did not come in `BODY_TIMEOUT_S`."""
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

    # -- sending

    def accept(self, sid: int) -> None:
        """Acknowledge a request, with the next flush and ahead of its items."""
        self._pending_accepts.append(sid)
        self.schedule_flush()

    def refuse(self, sid: int, failure: Failure) -> None:
        """Refuse a request: the client may send it to another instance."""
        self.control(frames.REFUSE, (sid, failure))

    def schedule_flush(self) -> None:
        """Flush once the event loop has run what is ready now."""
        if not self.flush_scheduled:
            self.flush_scheduled = True
            self._loop.call_soon(self.flush)

    def end_stream(self, sid: int, failure: Failure | None) -> None:
        """Send END, or ERROR with a failure, with the next flush and behind the stream's items."""
        self.streams.pop(sid, None)
        if failure is None:
            self._pending_ends.append(sid)
        else:
            self._pending_errors.append((sid, failure))
        self.schedule_flush()

    def flush(self) -> None:
        """Write what is pending: acceptances, then items, then the ends of streams."""
        self.flush_scheduled = False
        transport = self.transport
        if transport is None:
            return
        out = b""
        if self._pending_accepts:
            out = frames.pack(frames.ACCEPT, codec.encode(self._pending_accepts))
            self._pending_accepts = []
        if self.pending_sids:
            sids = self.pending_sids
            items = self.pending_items
            self.pending_sids = []
            self.pending_items = []
            try:
                out += frames.pack(frames.DATA, codec.encode((sids, items)))
            except Exception:  # an item that cannot be encoded, or too many bytes for one frame
                out += b"".join(self._pack_each(sids, items))
        if self._pending_ends:
            out += frames.pack(frames.END, codec.encode(self._pending_ends))
            self._pending_ends = []
        if self._pending_errors:
            out += b"".join(frames.pack(frames.ERROR, codec.encode(error)) for error in self._pending_errors)
            self._pending_errors = []
        if out:
            transport.write(out)
        if self.paused and transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.abort()

    def _pack_each(self, sids: list[int], items: list[Any]) -> list[bytes]:
        """Return one DATA frame for each item. An item that cannot be encoded ends its own stream with the error."""
        out: list[bytes] = []
        broken: set[int] = set()
        for sid, item in zip(sids, items, strict=True):
            if sid in broken:
                continue
            try:
                out.append(frames.pack(frames.DATA, codec.encode(((sid,), (item,)))))
            except Exception as error:
                broken.add(sid)
                self._pending_ends = [ended for ended in self._pending_ends if ended != sid]
                stream = self.streams.get(sid)
                self.end_stream(sid, pack(error))
                if stream is not None:
                    stream.cancel(error)
        return out

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        for stream in self.streams.values():
            stream.wake()

    # -- receiving

    def _dispatch(self, kind: int, body: bytes | bytearray) -> None:
        if kind == frames.HELLO:
            self._on_hello(body)
        elif not self.id:
            raise ValueError(f"frame of kind {kind} before HELLO")
        elif kind == frames.REQUEST:
            subject, request = _decode_request(body)
            self._listener.on_request(self, subject, request)
        elif kind == frames.CREDIT:
            sid, items = _decode_credit(body)
            if sid in self.streams:
                self.streams[sid].credit(items)
        elif kind == frames.CANCEL:
            self._on_cancel(_decode_sid(body))
        elif kind == frames.BODY:
            sid, data = _decode_body(body)
            waiter = self._bodies.setdefault(sid, self._loop.create_future())
            if not waiter.done():
                waiter.set_result(data)

    def _on_hello(self, body: bytes | bytearray) -> None:
        if self.id:
            raise ValueError("HELLO came twice")
        connection_id, key = _decode_hello(body)
        if not hmac.compare_digest(key.encode(), self._listener.key.encode()):
            raise ValueError("HELLO without the key of this process")
        self.id = connection_id
        self._reader.limit_bytes = frames.MAX_FRAME_BYTES
        self._listener.add(self)

    def _on_cancel(self, sid: int) -> None:
        waiter = self._bodies.pop(sid, None)
        if waiter is not None:
            waiter.cancel()
        if sid in self.streams:
            self.streams[sid].cancel()
            return
        # CANCEL came before its request, which went over NATS, or crossed the end of the stream.
        self._early_cancels[sid] = None
        if len(self._early_cancels) > EARLY_CANCELS:
            del self._early_cancels[next(iter(self._early_cancels))]

    def _on_lost(self) -> None:
        self._listener.remove(self)
        for waiter in self._bodies.values():
            waiter.cancel()
        self._bodies.clear()
        for stream in list(self.streams.values()):
            stream.cancel()
        self.pending_sids = []
        self.pending_items = []
        self._pending_accepts = []
        self._pending_ends = []
        self._pending_errors = []


class StreamListener:
    """Accepts RPC connections from clients that know its `key`, and keeps them by id, which requests over NATS name.

    `on_request(connection, subject, request)` handles the requests that come over a connection; it must not raise.
    """

    def __init__(self) -> None:
        self.key = secrets.token_hex(16)
        self.on_request: Callable[[ServerConnection, str, Request], None] = lambda connection, subject, request: None
        self.addresses: dict[str, str] = {}
        self.connections: dict[str, ServerConnection] = {}
        self.accepted: set[ServerConnection] = set()
        """all connections, including those that have not sent HELLO yet"""
        self._stopping = False
        self._added = asyncio.Event()
        self._servers: list[asyncio.Server] = []  # uvloop closes a listening server that is garbage-collected

    async def listen(self, *, unix: Path | None = None, tcp: tuple[str, int] | None = None) -> None:
        """Listen on a unix socket path, on TCP (port 0: any), or on both, and note them in `addresses`.

        Raises OSError.
        """
        loop = asyncio.get_running_loop()
        if unix is not None:
            unix.unlink(missing_ok=True)
            self._servers.append(await loop.create_unix_server(lambda: ServerConnection(self), str(unix)))
            os.chmod(unix, 0o600)
            self.addresses["unix"] = str(unix)
        if tcp is not None:
            host, port = tcp
            server = await loop.create_server(lambda: ServerConnection(self), host, port)
            self._servers.append(server)
            self.addresses["tcp"] = f"{host}:{server.sockets[0].getsockname()[1]}"

    async def connection(self, connection_id: str) -> ServerConnection | None:
        """Return the connection of that id; wait for its HELLO, at most `HELLO_TIMEOUT_S`. None if it does not come."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                while connection_id not in self.connections:
                    self._added.clear()
                    await self._added.wait()
        except TimeoutError:
            return None
        return self.connections[connection_id]

    def announce_stop(self) -> None:
        """Ask every client, later ones too, to send no new requests here."""
        self._stopping = True
        for connection in self.connections.values():
            connection.control(frames.BYE, None)

    def add(self, connection: ServerConnection) -> None:
        """Keep a connection that has sent its HELLO."""
        self.connections[connection.id] = connection
        self._added.set()
        if self._stopping:
            connection.control(frames.BYE, None)

    def remove(self, connection: ServerConnection) -> None:
        """Drop a connection that was lost."""
        self.accepted.discard(connection)
        if self.connections.get(connection.id) is connection:
            del self.connections[connection.id]

    async def close(self) -> None:
        """Stop listening, flush and close all connections."""
        for server in self._servers:
            server.close()
        for connection in list(self.accepted):
            connection.flush()
            connection.close()
        unix = self.addresses.get("unix")
        if unix is not None:
            Path(unix).unlink(missing_ok=True)

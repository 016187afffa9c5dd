"""The client's end of an RPC connection to one server process, and the streams that are read from it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from dynamo import codec
from dynamo.errors import BadCallError, DeadlineError, TransportError, WorkerLostError
from dynamo.rpc import frames
from dynamo.rpc.connection import MAX_UNREAD_BYTES, Connection
from dynamo.rpc.messages import Request
from dynamo.rpc.remote_errors import Failure, unpack
from dynamo.streams import Channel

log = logging.getLogger(__name__)

RPC_CONNECT_TIMEOUT_S = 3.0
DEADLINE_GRACE_S = 0.1
"""The server keeps the deadline too, and its error says more: wait for that."""

_decode_data = msgspec.msgpack.Decoder(tuple[list[int], list[msgspec.Raw]]).decode
_decode_sids = msgspec.msgpack.Decoder(list[int]).decode
_decode_failure = msgspec.msgpack.Decoder(tuple[int, Failure]).decode


class ClientStream:
    """One stream from a server: its items go to `channel`, the answer to its request to `reply`.

    Until it is `accepted` (the server acknowledged it, or an item came) the request may be sent to another instance.
    """

    __slots__ = ("accepted", "channel", "deadline_timer", "decode", "reply", "reply_timer", "sid")

    def __init__(self, sid: int, channel: Channel[Any], decode: codec.Decode, reply: asyncio.Future[bytes]) -> None:
        self.sid = sid
        self.channel = channel
        self.decode = decode
        self.reply = reply
        self.accepted = False
        self.deadline_timer: asyncio.TimerHandle | None = None
        self.reply_timer: asyncio.TimerHandle | None = None

    def end(self, error: BaseException | None = None) -> None:
        """End the channel. The stream must have been removed from its connection's `streams`."""
        self.accepted = True
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
        try:
            self.channel.end(error)
        except Exception:  # raised by the consumer: must not end the other streams of this connection
            log.exception("failed to handle the end of a stream")


class ClientConnection(Connection):
    """A connection to a server; `streams` are those that are being read from it, by stream id."""

    def __init__(self, key: str, on_lost: Callable[[ClientConnection], None], on_bye: Callable[[], None]) -> None:
        super().__init__()
        self._key = key
        self.id = uuid.uuid4().hex
        self.streams: dict[int, ClientStream] = {}
        self._notify_lost = on_lost
        self._notify_bye = on_bye
        self._next_sid = 0
        self._retired = False
        self._common_decode: codec.Decode | None = None
        """decodes the items of all streams, if they are of one type: whole frames are then decoded in one step"""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.control(frames.HELLO, (self.id, self._key))

    def open_stream(self, decode: codec.Decode, channel: Channel[Any], left_s: float | None = None) -> ClientStream:
        """Number a stream whose items go to `channel`; `left_s` seconds from now it ends with DeadlineError.

        Its `reply` raises WorkerLostError if the connection is lost before the request is answered.
        """
        self._next_sid += 1
        sid = self._next_sid
        loop = asyncio.get_running_loop()
        self._common_decode = decode if not self.streams or decode is self._common_decode else None
        stream = self.streams[sid] = ClientStream(sid, channel, decode, loop.create_future())
        channel.on_consumed = lambda items: self.control(frames.CREDIT, (sid, items))
        if left_s is not None:
            stream.deadline_timer = loop.call_later(left_s + DEADLINE_GRACE_S, self._expire, stream)
        return stream

    async def request(self, stream: ClientStream, subject: str, request: Request, timeout_s: float) -> None:
        """Send a request and wait until the server accepts it.

        Raises what the server refused it with; TransportError without an answer in time; WorkerLostError when the
        connection is lost.
        """
        if self.transport is None or self._unsent_bytes > MAX_UNREAD_BYTES:
            raise TransportError("the connection to the instance is closed or its send buffer is full")
        self.control(frames.REQUEST, (subject, request))
        left_s = None if request.timeout_s is None else request.timeout_s - timeout_s
        self._start_reply_timer(stream, timeout_s, left_s)
        try:
            await stream.reply
        finally:
            if stream.reply_timer is not None:
                stream.reply_timer.cancel()

    def _start_reply_timer(self, stream: ClientStream, wait_s: float, left_s: float | None) -> None:
        """Fail the reply `wait_s` from now with TransportError.

        While bytes move on the connection, in either direction, the wait is repeated, up to `left_s` more in all (None:
        no limit): the request or its answer may be queued behind other data.
        """
        reads = self.reads
        unsent_bytes = self._unsent_bytes

        def on_late() -> None:
            if stream.reply.done():
                return
            moved = self.reads != reads or self._unsent_bytes < unsent_bytes
            if moved and (left_s is None or left_s > 0):
                again_s = wait_s if left_s is None else min(wait_s, left_s)
                self._start_reply_timer(stream, again_s, None if left_s is None else left_s - again_s)
            else:
                stream.reply.set_exception(TransportError(f"the instance did not answer within {wait_s:.1f} s"))

        stream.reply_timer = asyncio.get_running_loop().call_later(wait_s, on_late)

    @property
    def _unsent_bytes(self) -> int:
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def cancel_stream(self, stream: ClientStream) -> None:
        """Drop the stream's further items and ask the server to stop. No-op if it has ended."""
        if stream.deadline_timer is not None:
            stream.deadline_timer.cancel()
        if self.streams.pop(stream.sid, None) is not None:
            self.control(frames.CANCEL, stream.sid)
            self._close_if_idle()

    def retire(self) -> None:
        """Close once the running streams have ended."""
        self._retired = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._retired and not self.streams:
            self.close()

    def _expire(self, stream: ClientStream) -> None:
        if stream.accepted:
            self.cancel_stream(stream)
            stream.end(DeadlineError("the response did not complete before the request's deadline"))

    # -- receiving

    def _dispatch(self, kind: int, body: bytes | bytearray) -> None:
        if kind == frames.DATA:
            self._push_items(body)
        elif kind == frames.END:
            self._on_end(body)
        elif kind == frames.ERROR:
            self._on_error(body)
        elif kind == frames.ACCEPT:
            self._on_accept(body)
        elif kind == frames.REFUSE:
            self._on_refuse(body)
        elif kind == frames.BYE:
            self._notify_bye()

    def _push_items(self, body: bytes | bytearray) -> None:
        """Push the items of a DATA frame to their channels. Items of streams that were cancelled here are dropped."""
        decoded, sids, items = self._decode_columns(body)
        get = self.streams.get
        for sid, item in zip(sids, items, strict=True):
            stream = get(sid)
            if stream is None:
                continue
            stream.accepted = True
            try:
                stream.channel.push(item if decoded else stream.decode(item))
            except codec.DecodeError as error:
                self.cancel_stream(stream)
                stream.end(_bad_response(stream, error))
            except Exception as error:
                self.cancel_stream(stream)
                stream.end(error)

    def _decode_columns(self, body: bytes | bytearray) -> tuple[bool, list[int], list[Any]]:
        """Return (True if the items are decoded already, the stream id of each item, the items)."""
        if self._common_decode is not None:
            try:
                return True, *self._common_decode.columns(body)
            except Exception:  # an item does not fit its type: decoding them one by one shows which
                pass
        return False, *_decode_data(body)

    def _on_end(self, body: bytes | bytearray) -> None:
        for sid in _decode_sids(body):
            stream = self.streams.pop(sid, None)
            if stream is not None:
                stream.end()
        self._close_if_idle()

    def _on_error(self, body: bytes | bytearray) -> None:
        sid, failure = _decode_failure(body)
        stream = self.streams.pop(sid, None)
        if stream is not None:
            stream.end(unpack(failure))
        self._close_if_idle()

    def _on_accept(self, body: bytes | bytearray) -> None:
        for sid in _decode_sids(body):
            stream = self.streams.get(sid)
            if stream is not None:
                stream.accepted = True
                if not stream.reply.done():
                    stream.reply.set_result(b"")

    def _on_refuse(self, body: bytes | bytearray) -> None:
        sid, failure = _decode_failure(body)
        stream = self.streams.pop(sid, None)
        if stream is not None and not stream.reply.done():
            stream.reply.set_exception(unpack(failure))
        self._close_if_idle()

    def _on_lost(self) -> None:
        streams = self.streams
        self.streams = {}
        self._notify_lost(self)
        for stream in streams.values():
            # `reply` may hold the acceptance already while the task that awaits it has not run yet
            if stream.accepted or _is_acceptance(stream.reply):
                stream.end(WorkerLostError("the connection to the instance was lost while it was answering"))
            elif not stream.reply.done():
                stream.reply.set_exception(WorkerLostError("the connection was lost before the instance had accepted"))


def _bad_response(stream: ClientStream, fault: codec.DecodeError) -> BadCallError:
    """Log an item that does not fit the declared type, a bug of the service that sent it; return the error for that."""
    error = BadCallError(f"invalid response of instance {stream.channel.source or 0:x}: {fault.message}")
    log.error("%s", error.message)
    return error


def _is_acceptance(reply: asyncio.Future[bytes]) -> bool:
    return reply.done() and not reply.cancelled() and reply.exception() is None and not reply.result()


async def connect(
    addresses: dict[str, str],
    key: str,
    *,
    same_host: bool,
    on_lost: Callable[[ClientConnection], None],
    on_bye: Callable[[], None],
) -> ClientConnection:
    """Connect to a listener, by its unix socket on the same host, else by TCP, and send HELLO with its key.

    `on_bye` is called when the server is stopping and wants no new requests. Raises TransportError.
    """
    loop = asyncio.get_running_loop()
    tried: list[str] = []

    def protocol() -> ClientConnection:
        return ClientConnection(key, on_lost, on_bye)

    try:
        async with asyncio.timeout(RPC_CONNECT_TIMEOUT_S):
            if same_host and "unix" in addresses:
                try:
                    return (await loop.create_unix_connection(protocol, addresses["unix"]))[1]
                except OSError as error:  # perhaps in another container
                    tried.append(f"unix:{addresses['unix']} ({error.strerror or error})")
            if "tcp" in addresses:
                host, _, port = addresses["tcp"].rpartition(":")
                try:
                    return (await loop.create_connection(protocol, host.strip("[]"), int(port)))[1]
                except (OSError, ValueError) as error:
                    tried.append(f"tcp:{addresses['tcp']} ({getattr(error, 'strerror', None) or error})")
    except TimeoutError:
        tried.append(f"tcp:{addresses.get('tcp', '?')} (no answer in {RPC_CONNECT_TIMEOUT_S:g} s)")
    raise TransportError(f"cannot connect to the instance: {', '.join(tried) or 'it has no address'}")

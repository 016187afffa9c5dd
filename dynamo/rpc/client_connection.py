"""The caller's end of the stream plane: the connection to one callee, and the streams that come in over it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from dynamo import codec
from dynamo.errors import DeadlineError, TransportError, WorkerLostError
from dynamo.rpc import frames
from dynamo.rpc.connection import Connection, log
from dynamo.rpc.messages import Request
from dynamo.rpc.remote_errors import Failure, unpack
from dynamo.streams import Channel

CONNECT_TIMEOUT_S = 3.0
MAX_UNREAD_BYTES = frames.MAX_FRAME_BYTES  # a callee that is this far behind is not reading
DEADLINE_GRACE_S = 0.1  # the callee keeps the deadline too, and says more about it

_decode_data = msgspec.msgpack.Decoder(tuple[list[int], list[msgspec.Raw]]).decode
_decode_sids = msgspec.msgpack.Decoder(list[int]).decode
_decode_failed = msgspec.msgpack.Decoder(tuple[int, Failure]).decode


class Incoming:
    """One stream. Until it is `accepted` (the callee said so, or an item came) it may be tried elsewhere."""

    __slots__ = ("accepted", "channel", "decode", "patience", "reply", "sid", "timer")

    def __init__(self, sid: int, channel: Channel[Any], decode: codec.Decode, reply: asyncio.Future[bytes]) -> None:
        self.sid, self.channel, self.decode, self.reply = sid, channel, decode, reply
        self.accepted = False
        self.timer: asyncio.TimerHandle | None = None
        self.patience: asyncio.TimerHandle | None = None

    def end(self, error: BaseException | None = None) -> None:
        """Must have been taken out of the connection's `incoming`."""
        self.accepted = True
        if self.timer is not None:
            self.timer.cancel()
        try:
            self.channel.end(error)
        except Exception:  # the consumer's, and the other streams of this connection must not suffer
            log.exception("the end of a stream was not handled")


class ClientConnection(Connection):
    """A connection to a callee; `incoming` are the streams that are read from it."""

    def __init__(self, key: str, on_lost: Callable[[ClientConnection], None], on_bye: Callable[[], None]) -> None:
        super().__init__()
        self._key = key
        self.id = uuid.uuid4().hex
        self.incoming: dict[int, Incoming] = {}
        self._on_lost, self._on_bye = on_lost, on_bye
        self._next_sid = 0
        self._retired = False
        self._decode: codec.Decode | None = None
        """how the items of all streams decode, where they are of one type: a frame then decodes at once"""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.control(frames.HELLO, (self.id, self._key))

    def receive(self, decode: codec.Decode, channel: Channel[Any], left_s: float | None = None) -> Incoming:
        """Number a stream whose items go to `channel`; `left_s` seconds from now it ends with DeadlineError.

        The request's answer goes to `reply`; losing the connection before that is a WorkerLostError there.
        """
        self._next_sid += 1
        sid = self._next_sid
        loop = asyncio.get_running_loop()
        self._decode = decode if not self.incoming or decode is self._decode else None
        incoming = self.incoming[sid] = Incoming(sid, channel, decode, loop.create_future())
        channel.on_consumed = lambda items: self.control(frames.CREDIT, (sid, items))
        if left_s is not None:
            incoming.timer = loop.call_later(left_s + DEADLINE_GRACE_S, self._expire, incoming)
        return incoming

    async def request(self, incoming: Incoming, subject: str, request: Request, timeout_s: float) -> None:
        """Ask the callee, which must have given its key, for a stream. Returns when it has accepted.

        Raises what it refused with; TransportError when it says nothing in time; WorkerLostError when the connection is
        lost.
        """
        if self.transport is None or self._unsent > MAX_UNREAD_BYTES:
            raise TransportError("the instance takes nothing")
        self.control(frames.REQUEST, (subject, request))
        self._wait_for_reply(incoming, timeout_s, None if request.timeout_s is None else request.timeout_s - timeout_s)
        try:
            await incoming.reply
        finally:
            if incoming.patience is not None:
                incoming.patience.cancel()

    def _wait_for_reply(self, incoming: Incoming, wait_s: float, left_s: float | None) -> None:
        """`wait_s` from now it is late, unless something moves meanwhile: more may be on its way before it."""
        reads, unsent = self.reads, self._unsent

        def late() -> None:
            if incoming.reply.done():
                return
            moved = self.reads != reads or self._unsent < unsent
            if moved and (left_s is None or left_s > 0):
                again_s = wait_s if left_s is None else min(wait_s, left_s)
                self._wait_for_reply(incoming, again_s, None if left_s is None else left_s - again_s)
            else:
                incoming.reply.set_exception(TransportError(f"the instance did not answer within {wait_s:.1f} s"))

        incoming.patience = asyncio.get_running_loop().call_later(wait_s, late)

    @property
    def _unsent(self) -> int:
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def forget(self, incoming: Incoming) -> None:
        """Nobody wants this stream any more: its items are dropped, the callee stops."""
        if incoming.timer is not None:
            incoming.timer.cancel()
        if self.incoming.pop(incoming.sid, None) is not None:
            self.control(frames.CANCEL, incoming.sid)
            self._close_if_idle()

    def retire(self) -> None:
        """Close when the streams that run have ended."""
        self._retired = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._retired and not self.incoming:
            self.close()

    def _expire(self, incoming: Incoming) -> None:
        if incoming.accepted:
            self.forget(incoming)
            incoming.end(DeadlineError("no end of the answer within the request's deadline"))

    def _take(self, body: bytes | bytearray) -> None:
        """Push the items of a DATA frame; those of streams that were cancelled here meanwhile are dropped."""
        decoded, sids, items = self._columns(body)
        get = self.incoming.get
        for sid, item in zip(sids, items, strict=True):
            found = get(sid)
            if found is None:
                continue
            found.accepted = True
            try:
                found.channel.push(item if decoded else found.decode(item))
            except Exception as error:
                self.forget(found)
                found.end(error)

    def _columns(self, body: bytes | bytearray) -> tuple[bool, list[int], list[Any]]:
        """Whether the items are decoded already, the streams' numbers, the items."""
        if self._decode is not None:
            try:
                return True, *self._decode.columns(body)
            except Exception:  # one item does not fit: one by one shows whose
                pass
        return False, *_decode_data(body)

    def _dispatch(self, kind: int, body: bytes | bytearray) -> None:
        incoming = self.incoming
        if kind == frames.DATA:
            self._take(body)
        elif kind == frames.END:
            for sid in _decode_sids(body):
                found = incoming.pop(sid, None)
                if found is not None:
                    found.end()
            self._close_if_idle()
        elif kind == frames.ERROR:
            sid, failure = _decode_failed(body)
            found = incoming.pop(sid, None)
            if found is not None:
                found.end(unpack(failure))
            self._close_if_idle()
        elif kind == frames.ACCEPT:
            for sid in _decode_sids(body):
                found = incoming.get(sid)
                if found is not None:
                    found.accepted = True
                    if not found.reply.done():
                        found.reply.set_result(b"")
        elif kind == frames.REFUSE:
            sid, failure = _decode_failed(body)
            found = incoming.pop(sid, None)
            if found is not None and not found.reply.done():
                found.reply.set_exception(unpack(failure))
            self._close_if_idle()
        elif kind == frames.BYE:
            self._on_bye()

    def _lost(self) -> None:
        incoming, self.incoming = self.incoming, {}
        self._on_lost(self)
        for found in incoming.values():
            if found.accepted or _is_acceptance(found.reply):  # who awaits the reply may not have seen it yet
                found.end(WorkerLostError("the connection to the instance was lost while it was answering"))
            elif not found.reply.done():
                found.reply.set_exception(WorkerLostError("the connection was lost before the instance had accepted"))


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
    """Connect to a listener, by its unix socket on the same host, else by TCP, and show its key.

    Raises TransportError.
    """
    loop = asyncio.get_running_loop()
    tried: list[str] = []

    def protocol() -> ClientConnection:
        return ClientConnection(key, on_lost, on_bye)

    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if same_host and "unix" in addresses:
                try:
                    return (await loop.create_unix_connection(protocol, addresses["unix"]))[1]
                except OSError as error:  # in another container, perhaps
                    tried.append(f"unix:{addresses['unix']} ({error.strerror or error})")
            if "tcp" in addresses:
                host, _, port = addresses["tcp"].rpartition(":")
                try:
                    return (await loop.create_connection(protocol, host.strip("[]"), int(port)))[1]
                except (OSError, ValueError) as error:
                    tried.append(f"tcp:{addresses['tcp']} ({getattr(error, 'strerror', None) or error})")
    except TimeoutError:
        tried.append(f"tcp:{addresses.get('tcp', '?')} (no answer in {CONNECT_TIMEOUT_S:g} s)")
    raise TransportError(f"cannot connect to the instance's stream plane: {', '.join(tried) or 'it has no address'}")

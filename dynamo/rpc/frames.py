"""Frames of an RPC connection: 4 bytes length (big-endian, of what follows), 1 byte kind, msgpack body.

HELLO   [str, str]               first frame: an id for this connection, and the server's key, from discovery
REQUEST [subject, Request]       a request that does not go over NATS
ACCEPT  [sid ...]                these requests were accepted: the method runs
REFUSE  [sid, Failure]           this one was not, and may be sent to another instance
DATA    [[sid ...], [item ...]]  the items of one engine step for all streams of this client, in columns
END     [sid ...]                these streams are complete
ERROR   [sid, Failure]           this stream failed, after the items sent before
CANCEL  sid                      the client no longer wants this stream
CREDIT  [sid, n]                 the client has read n more items
BODY    [sid, bytes]             a request body that is too large for NATS, sent ahead of its request
BYE     nil                      the server is stopping: send it no new requests; running streams finish
"""

from __future__ import annotations

import struct
from collections.abc import Callable

MAX_FRAME_BYTES = 1 << 28

HELLO, DATA, END, ERROR, CANCEL, CREDIT, BODY, BYE, REQUEST, ACCEPT, REFUSE = range(11)

_HEAD = struct.Struct("!IB")
HEAD_BYTES = _HEAD.size


def pack(kind: int, body: bytes) -> bytes:
    """Return a frame. Raises ValueError for a body that is too large for one."""
    if len(body) >= MAX_FRAME_BYTES:
        raise ValueError(f"{len(body)} bytes are too many for one message")
    return _HEAD.pack(len(body) + 1, kind) + body


class FrameReader:
    """Cuts received bytes into frames and calls `on_frame(kind, body)` for each complete one, in order."""

    __slots__ = ("_on_frame", "_rest", "limit_bytes")

    def __init__(self, on_frame: Callable[[int, bytes | bytearray], None], limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._rest = bytearray()
        self._on_frame = on_frame
        self.limit_bytes = limit_bytes

    def feed(self, data: bytes | bytearray) -> None:
        """Add received bytes.

        Raises ValueError for a length of zero or above `limit_bytes`: the other end does not speak this protocol.
        """
        if self._rest:
            self._rest += data
            data = self._rest
        start, size = 0, len(data)
        while size - start >= HEAD_BYTES:
            length, kind = _HEAD.unpack_from(data, start)
            if not 0 < length <= self.limit_bytes:
                raise ValueError(f"frame of {length} bytes")
            end = start + 4 + length
            if size < end:
                break
            self._on_frame(kind, data[start + HEAD_BYTES : end])
            start = end
        if data is self._rest:
            del self._rest[:start]
        else:
            self._rest += data[start:]

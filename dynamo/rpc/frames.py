"""Frames of the stream plane: 4 bytes length (big-endian, of what follows), 1 byte kind, msgpack body.

HELLO   [str, str]               first, and once: an id for this connection, and the callee's key, which discovery tells
REQUEST [subject, Request]       a request that does not go over NATS
ACCEPT  [sid ...]                these requests were accepted: the method runs
REFUSE  [sid, Failure]           this one was not, and may be tried elsewhere
DATA    [[sid ...], [item ...]]  the items of one engine step for all streams of this peer, in columns
END     [sid ...]                these streams are complete
ERROR   [sid, Failure]           this stream failed; its earlier items count
CANCEL  sid                      the caller no longer wants this stream
CREDIT  [sid, n]                 the caller has read n more items
BODY    [sid, bytes]             a request body that is too large for NATS, sent ahead of its request
BYE     nil                      the peer is stopping: send it no new requests; running streams finish
"""

from __future__ import annotations

import struct
from collections.abc import Callable

MAX_FRAME_BYTES = 1 << 28

HELLO, DATA, END, ERROR, CANCEL, CREDIT, BODY, BYE, REQUEST, ACCEPT, REFUSE = range(11)

_HEAD = struct.Struct("!IB")
HEAD_BYTES = _HEAD.size


def pack(kind: int, body: bytes) -> bytes:
    """Raises ValueError for a body that no receiver would take."""
    if len(body) >= MAX_FRAME_BYTES:
        raise ValueError(f"{len(body)} bytes are too many for one message")
    return _HEAD.pack(len(body) + 1, kind) + body


class FrameReader:
    """Cuts received bytes into frames: `on_frame(kind, body)` for each complete one, in order.

    `feed` raises ValueError for a length above `limit_bytes` or of zero: the peer does not speak this protocol.
    """

    __slots__ = ("_on_frame", "_rest", "limit_bytes")

    def __init__(self, on_frame: Callable[[int, bytes | bytearray], None], limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._rest = bytearray()
        self._on_frame, self.limit_bytes = on_frame, limit_bytes

    def feed(self, data: bytes | bytearray) -> None:
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

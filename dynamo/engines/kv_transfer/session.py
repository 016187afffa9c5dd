"""A connection between two engines: frames, proof that both know the deployment's secret, messages.

The holder is the engine whose KV is fetched, the reader the one that fetches it. A session begins with a handshake
(`Hello`, `Join`, `Welcome`), then the reader sends one `Fetch` after the other:

    reader  Fetch                              Done
    holder         Filled Filled ... | Refused

With shared memory the reader sends `Next` for each slot that it has emptied. Without it the bytes of a chunk follow its
`Filled`. `Done` ends the lease; without a fetch before it, nothing is read.

The proof is HMAC-SHA256 over both sides' nonces, with a label of its own for each side. Nothing after it is encrypted:
the network between the hosts of a deployment is trusted to carry KV, but not to decide who may connect.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec

SECRET = "DYNAMO_KV_SECRET"
"""environment variable: any text, the same for all engines of a deployment"""
SHARED = "DYNAMO_KV_SECRET_SHARED"
"""environment variable: set if the user chose the secret, so that other hosts know it too; unset if `dynamo serve`
generated it for its own host"""
PROTOCOL = 2
NONCE_BYTES = 32
MAX_HANDSHAKE_BYTES = 256
MAX_MESSAGE_BYTES = 1 << 18
HANDSHAKE_TIMEOUT_S = 5.0
SILENCE_S = 10.0
"""limit on waiting for the peer's next byte during a transfer"""

_LENGTH = struct.Struct("!I")


class Plane(msgspec.Struct, frozen=True):
    """One tensor, or one half of it, with the block index first: shape and strides of a block in elements."""

    shape: list[int]
    strides: list[int]


class Layout(msgspec.Struct, frozen=True):
    """Layout of a KV cache. Blocks can be copied as bytes only between equal layouts."""

    engine: str
    """vLLM's version: its attention kernels decide how a block is filled"""
    model: str
    dtype: str
    block_tokens: int
    planes: list[Plane]


class RemoteKv(msgspec.Struct, frozen=True):
    """KV held by another engine: its lease and the address of its server. Travels in vLLM's kv_transfer_params."""

    lease_id: str
    tokens: int
    digest: str
    """of the token ids whose KV it is"""
    host: str
    """`host_id` of the holder: shared memory is tried only on the same host"""
    local: str
    """abstract unix socket; empty if the holder has none"""
    address: str
    port: int


class Hello(msgspec.Struct, tag=True):
    """Holder to reader, first: the protocol's version and a nonce."""

    protocol: int
    nonce: bytes


class Join(msgspec.Struct, tag=True):
    """Reader to holder: its nonce, and proof that it knows the secret."""

    nonce: bytes
    proof: bytes


class Welcome(msgspec.Struct, tag=True):
    """Holder to reader: proof that it knows the secret, and its cache's layout."""

    proof: bytes
    layout: Layout


class Fetch(msgspec.Struct, tag=True):
    """Reader to holder: send `blocks` blocks of a lease, beginning with block number `first` of it.

    `slots` and `slot_bytes` describe the reader's staging memory, whose descriptor comes with the first fetch of a
    session; `slots` is 0 if the bytes are to be sent on the connection instead.
    """

    lease_id: str
    first: int
    blocks: int
    slot_bytes: int
    slots: int


class Next(msgspec.Struct, tag=True):
    """Reader to holder: the oldest filled slot has been read and may be filled again."""


class Filled(msgspec.Struct, tag=True):
    """Holder to reader: the next chunk is in its slot, or its bytes follow this message."""


class Refused(msgspec.Struct, tag=True):
    """Holder to reader, instead of the first `Filled`: the fetch cannot be served."""

    reason: str


class Done(msgspec.Struct, tag=True):
    """Reader to holder: the lease is no longer needed."""

    lease_id: str


FromReader = Fetch | Next | Done
FromHolder = Filled | Refused
T = TypeVar("T")


class SessionError(Exception):
    """The session failed: the peer disconnected, fell silent, is not of this deployment or broke the protocol."""


class RefusedError(SessionError):
    """The holder refused a fetch. The session itself is intact."""


class Session:
    """Messages over a connected socket, framed by 4 bytes of length, in msgpack. Blocking.

    Waits are limited: to HANDSHAKE_TIMEOUT_S at first, then as `set_timeout` and `clear_timeout` say. Every method
    raises SessionError if the connection fails or a wait exceeds its limit.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(HANDSHAKE_TIMEOUT_S)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # detects a host that lost power

    def close(self) -> None:
        self._socket.close()

    def send(self, message: msgspec.Struct, descriptor: int | None = None) -> None:
        """Send a message, with a file descriptor if one is given (unix sockets only)."""
        body = msgspec.msgpack.encode(message)
        frame = _LENGTH.pack(len(body)) + body
        if descriptor is None:
            self._call(partial(self._socket.sendall, frame))
        else:
            self._call(partial(socket.send_fds, self._socket, [frame], [descriptor]))

    def send_bytes(self, data: Any) -> None:
        """Send a buffer as it is, without a frame."""
        self._call(partial(self._socket.sendall, data))

    def receive(self, kind: Any, limit_bytes: int = MAX_MESSAGE_BYTES) -> Any:
        """Return the next message, which must be of type `kind`."""
        return self._decode(self._read(_LENGTH.size), kind, limit_bytes)

    def receive_with_descriptor(self, kind: Any) -> tuple[Any, int | None]:
        """Return the next message and the file descriptor sent with it, or None; only unix sockets carry descriptors."""
        if self._socket.family != socket.AF_UNIX:
            return self.receive(kind), None
        head, descriptors, _, _ = self._call(partial(socket.recv_fds, self._socket, _LENGTH.size, 1))
        if not head:
            raise SessionError("the peer closed the connection")
        try:
            head += self._read(_LENGTH.size - len(head))
            message = self._decode(head, kind, MAX_MESSAGE_BYTES)
        except SessionError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return message, (descriptors[0] if descriptors else None)

    def receive_bytes(self, target: Any) -> None:
        """Receive as many bytes as the buffer `target` holds, into it."""
        view = memoryview(target)
        received = 0
        while received < len(view):
            rest = view[received:]
            count = self._call(partial(self._socket.recv_into, rest))
            if not count:
                raise SessionError("the peer closed the connection")
            received += count

    def clear_timeout(self) -> None:
        """Wait without limit from now on: a session that is kept open is idle between fetches."""
        self._socket.settimeout(None)

    def set_timeout(self) -> None:
        """Wait at most SILENCE_S for the peer's next bytes from now on."""
        self._socket.settimeout(SILENCE_S)

    def _read(self, count: int) -> bytes:
        data = bytearray(count)
        self.receive_bytes(data)
        return bytes(data)

    def _decode(self, head: bytes, kind: Any, limit_bytes: int) -> Any:
        """Read the body that the length `head` announces, and decode it."""
        (length,) = _LENGTH.unpack(head)
        if length > limit_bytes:
            raise SessionError(f"received a message of {length} bytes, the limit is {limit_bytes}")
        try:
            return msgspec.msgpack.decode(self._read(length), type=kind)
        except msgspec.DecodeError as error:
            raise SessionError(f"received an invalid message: {error}") from None

    @staticmethod
    def _call(operation: Callable[[], T]) -> T:
        """Run a socket operation, with OSError turned into SessionError."""
        try:
            return operation()
        except OSError as error:
            text = "the peer is not responding" if isinstance(error, TimeoutError) else str(error)
            raise SessionError(text) from None


def _proof(secret: bytes, label: bytes, holder_nonce: bytes, reader_nonce: bytes) -> bytes:
    return hmac.new(secret, label + holder_nonce + reader_nonce, hashlib.sha256).digest()


def handshake_as_holder(session: Session, secret: bytes, layout: Layout) -> bool:
    """Return True if the reader has proved that it knows the secret. Raises SessionError if the handshake fails."""
    nonce = os.urandom(NONCE_BYTES)
    session.send(Hello(PROTOCOL, nonce))
    join = session.receive(Join, MAX_HANDSHAKE_BYTES)
    if len(join.nonce) != NONCE_BYTES:
        raise SessionError(f"received a nonce of {len(join.nonce)} bytes, expected {NONCE_BYTES}")
    if not hmac.compare_digest(join.proof, _proof(secret, b"reader", nonce, join.nonce)):
        return False
    session.send(Welcome(_proof(secret, b"holder", nonce, join.nonce), layout))
    return True


def handshake_as_reader(session: Session, secret: bytes) -> Layout:
    """Return the holder's layout. Raises SessionError if the holder does not know the secret or the handshake fails."""
    hello = session.receive(Hello, MAX_HANDSHAKE_BYTES)
    if hello.protocol != PROTOCOL or len(hello.nonce) != NONCE_BYTES:
        raise SessionError(f"the peer speaks protocol {hello.protocol}, this engine {PROTOCOL}")
    nonce = os.urandom(NONCE_BYTES)
    session.send(Join(nonce, _proof(secret, b"reader", hello.nonce, nonce)))
    try:
        welcome = session.receive(Welcome)
    except SessionError as error:
        raise SessionError(f"{error} during the handshake: is {SECRET} the same on both sides?") from None
    if not hmac.compare_digest(welcome.proof, _proof(secret, b"holder", hello.nonce, nonce)):
        raise SessionError(f"the peer does not know this deployment's {SECRET}")
    layout: Layout = welcome.layout
    return layout


def layout_difference(theirs: Layout, ours: Layout) -> str:
    """Describe the first difference that prevents copies of KV between two caches; empty if there is none."""
    for name in ("engine", "model", "dtype", "block_tokens"):
        there = getattr(theirs, name)
        here = getattr(ours, name)
        if there != here:
            return f"{name.replace('_', ' ')} {there} there, {here} here"
    if len(theirs.planes) != len(ours.planes):
        return f"{len(theirs.planes)} KV tensors there, {len(ours.planes)} here"
    for there, here in zip(theirs.planes, ours.planes, strict=True):
        if there != here:
            return f"a KV block of {there.shape} by {there.strides} there, {here.shape} by {here.strides} here"
    return ""

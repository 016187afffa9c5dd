"""A connection between two engines: frames, proof that both know the deployment's secret, messages.

The proof is HMAC-SHA256 over both sides' nonces, each side's under a label of its own. Nothing that follows is encrypted:
the network between the hosts of a deployment is trusted with what it carries, not with who connects.
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
"""set where a user gave that text, and not `dynamo serve` of one host: then other hosts have it too"""
PROTOCOL = 1
NONCE_BYTES = 32
MAX_GREETING_BYTES = 256
MAX_MESSAGE_BYTES = 1 << 18
GREETING_TIMEOUT_S = 5.0
SILENCE_S = 10.0
"""without a byte from the peer, in the middle of something, before it is given up"""

_LENGTH = struct.Struct("!I")


class Plane(msgspec.Struct, frozen=True):
    """One tensor, or one half of it, with the block index first: shape and strides of a block in elements."""

    shape: list[int]
    strides: list[int]


class Layout(msgspec.Struct, frozen=True):
    """What must be equal on both sides, for bytes to be copied."""

    engine: str
    """vLLM's version: its attention kernels decide how a block is filled"""
    model: str
    dtype: str
    block_tokens: int
    planes: list[Plane]


class Offer(msgspec.Struct, frozen=True):
    """Where KV is held, as it travels in kv_transfer_params. `host` tells whether shared memory can be tried."""

    holding: str
    tokens: int
    digest: str
    """of the token ids whose KV it is"""
    host: str
    local: str
    """abstract unix socket; empty: there is none"""
    address: str
    port: int


class Hello(msgspec.Struct, tag=True):
    protocol: int
    nonce: bytes


class Join(msgspec.Struct, tag=True):
    nonce: bytes
    proof: bytes


class Welcome(msgspec.Struct, tag=True):
    proof: bytes
    layout: Layout


class Fetch(msgspec.Struct, tag=True):
    """Blocks of a holding, from the `first` on. `slots` is 0 where bytes are to follow on the connection itself."""

    holding: str
    first: int
    blocks: int
    slot_bytes: int
    slots: int


class Next(msgspec.Struct, tag=True):
    """The reader is done with the oldest filled slot."""


class Filled(msgspec.Struct, tag=True):
    """The next chunk is in its slot, or follows as bytes."""


class Refused(msgspec.Struct, tag=True):
    reason: str


class Done(msgspec.Struct, tag=True):
    """Nobody needs the holding any more."""

    holding: str


FromReader = Fetch | Next | Done
FromHolder = Filled | Refused
T = TypeVar("T")


class SessionError(Exception):
    """The peer is gone, silent, foreign, or does not keep to the protocol."""


class RefusedError(SessionError):
    """The holder has answered, and has nothing for us."""


class Session:
    """Frames over a connected socket: 4 bytes of length, then msgpack. Blocking, with a limit on every wait."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(GREETING_TIMEOUT_S)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host may go without a word

    def close(self) -> None:
        self._socket.close()

    def send(self, message: msgspec.Struct, descriptor: int | None = None) -> None:
        body = msgspec.msgpack.encode(message)
        frame = _LENGTH.pack(len(body)) + body
        if descriptor is None:
            self._guard(partial(self._socket.sendall, frame))
        else:
            self._guard(partial(socket.send_fds, self._socket, [frame], [descriptor]))

    def send_bytes(self, data: Any) -> None:
        """A buffer."""
        self._guard(partial(self._socket.sendall, data))

    def receive(self, kind: Any, limit_bytes: int = MAX_MESSAGE_BYTES) -> Any:
        return self._decode(self._read(_LENGTH.size), kind, limit_bytes)

    def receive_with_descriptor(self, kind: Any) -> tuple[Any, int | None]:
        """A message and the file descriptor that came with it. Only on a unix socket do any come."""
        if self._socket.family != socket.AF_UNIX:
            return self.receive(kind), None
        head, descriptors, _, _ = self._guard(partial(socket.recv_fds, self._socket, _LENGTH.size, 1))
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
        """Fills a buffer."""
        into, received = memoryview(target), 0
        while received < len(into):
            rest = into[received:]
            count = self._guard(partial(self._socket.recv_into, rest))
            if not count:
                raise SessionError("the peer closed the connection")
            received += count

    def wait_long(self) -> None:
        """Until the next message: a session that is kept for later is silent meanwhile."""
        self._socket.settimeout(None)

    def wait_briefly(self) -> None:
        self._socket.settimeout(SILENCE_S)

    def _read(self, count: int) -> bytes:
        data = bytearray(count)
        self.receive_bytes(data)
        return bytes(data)

    def _decode(self, head: bytes, kind: Any, limit_bytes: int) -> Any:
        (length,) = _LENGTH.unpack(head)
        if length > limit_bytes:
            raise SessionError(f"a message of {length} bytes where at most {limit_bytes} are allowed")
        try:
            return msgspec.msgpack.decode(self._read(length), type=kind)
        except msgspec.DecodeError as error:
            raise SessionError(f"a message that is none of ours: {error}") from None

    @staticmethod
    def _guard(act: Callable[[], T]) -> T:
        try:
            return act()
        except OSError as error:
            raise SessionError("the peer is silent" if isinstance(error, TimeoutError) else str(error)) from None


def _proof(secret: bytes, label: bytes, holder_nonce: bytes, reader_nonce: bytes) -> bytes:
    return hmac.new(secret, label + holder_nonce + reader_nonce, hashlib.sha256).digest()


def greet_as_holder(session: Session, secret: bytes, layout: Layout) -> bool:
    """Whether the peer knows the secret. Raises SessionError for one that does not speak the protocol."""
    nonce = os.urandom(NONCE_BYTES)
    session.send(Hello(PROTOCOL, nonce))
    join = session.receive(Join, MAX_GREETING_BYTES)
    if len(join.nonce) != NONCE_BYTES:
        raise SessionError("a nonce of a wrong length")
    if not hmac.compare_digest(join.proof, _proof(secret, b"reader", nonce, join.nonce)):
        return False
    session.send(Welcome(_proof(secret, b"holder", nonce, join.nonce), layout))
    return True


def greet_as_reader(session: Session, secret: bytes) -> Layout:
    """The holder's layout. Raises SessionError where the peer is not of this deployment."""
    hello = session.receive(Hello, MAX_GREETING_BYTES)
    if hello.protocol != PROTOCOL or len(hello.nonce) != NONCE_BYTES:
        raise SessionError(f"it speaks protocol {hello.protocol}, this engine {PROTOCOL}")
    nonce = os.urandom(NONCE_BYTES)
    session.send(Join(nonce, _proof(secret, b"reader", hello.nonce, nonce)))
    try:
        welcome = session.receive(Welcome)
    except SessionError as error:
        raise SessionError(f"{error} at the greeting: is {SECRET} the same on both sides?") from None
    if not hmac.compare_digest(welcome.proof, _proof(secret, b"holder", hello.nonce, nonce)):
        raise SessionError(f"it does not know this deployment's {SECRET}")
    layout: Layout = welcome.layout
    return layout


def difference(theirs: Layout, ours: Layout) -> str:
    """What keeps KV from being copied, for a person; empty where nothing does."""
    for name in ("engine", "model", "dtype", "block_tokens"):
        there, here = getattr(theirs, name), getattr(ours, name)
        if there != here:
            return f"{name.replace('_', ' ')} {there} there, {here} here"
    if len(theirs.planes) != len(ours.planes):
        return f"{len(theirs.planes)} KV tensors there, {len(ours.planes)} here"
    for there, here in zip(theirs.planes, ours.planes, strict=True):
        if there != here:
            return f"a KV block of {there.shape} by {there.strides} there, {here.shape} by {here.strides} here"
    return ""

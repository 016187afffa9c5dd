"""Whether a process runs at all: a byte there, a byte back, over a connection beside the stream plane.

A process that was stopped keeps its connections, so its callers would wait for ever. It is a thread that answers, and not
the event loop: a handler that blocks the loop for a minute is slow, not dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors
import socket
import threading
from collections.abc import Callable
from typing import cast

from dynamo.errors import TransportError
from dynamo.transport.network import listening_socket

BEAT_S = 1.0
CONNECT_TIMEOUT_S = 1.0
FIRST_ANSWER_S = 2.0


class Heartbeat:
    """The callee's end: listens on `host`, which others reach as `advertised`. Raises TransportError. `close` it."""

    def __init__(self, host: str, advertised: str = "") -> None:
        self._server = listening_socket(host)
        self.address = f"{advertised or host}:{self._server.getsockname()[1]}"
        self._closing, closed = socket.socketpair()
        self._thread = threading.Thread(target=self._answer, args=(closed,), name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.close()
        self._thread.join()

    def _answer(self, closed: socket.socket) -> None:
        callers: set[socket.socket] = set()
        with selectors.DefaultSelector() as selector, self._server as server, closed:
            selector.register(server, selectors.EVENT_READ)
            selector.register(closed, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    ready = cast(socket.socket, key.fileobj)
                    if ready is closed:
                        for caller in callers:
                            caller.close()
                        return
                    if ready is server:
                        with contextlib.suppress(OSError):  # it has gone again, or there are no descriptors left
                            caller, _ = server.accept()
                            caller.setblocking(False)
                            selector.register(caller, selectors.EVENT_READ)
                            callers.add(caller)
                    elif not _answered(ready):
                        selector.unregister(ready)
                        callers.discard(ready)
                        ready.close()


def _answered(caller: socket.socket) -> bool:
    try:
        asked = caller.recv(64)
        if asked:
            caller.send(b".")
    except BlockingIOError:  # it does not read: its affair
        return True
    except OSError:
        return False
    return bool(asked)


class Watch(asyncio.Protocol):
    """The caller's end: asks every BEAT_S; `on_silent` is called once when `silence_s` have passed without an answer.

    Questions without an answer are counted, not seconds: this process may have been stopped itself.
    """

    def __init__(self, silence_s: float, on_silent: Callable[[], None]) -> None:
        self._patience = max(math.ceil(silence_s / BEAT_S), 1)
        self._on_silent = on_silent
        self._loop = asyncio.get_running_loop()
        self._unanswered = 0
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.answered: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._beat()

    def data_received(self, data: bytes) -> None:
        self._unanswered = 0
        if not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """If the process has died, its stream connection tells."""
        self.close()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self.answered.cancel()

    def _beat(self) -> None:
        if self._unanswered >= self._patience:
            lived = self.answered.done()
            self.close()
            if lived:
                self._on_silent()
        elif self._transport is not None:
            self._unanswered += 1
            self._transport.write(b"?")
            self._timer = self._loop.call_later(BEAT_S, self._beat)


async def watch(address: str, silence_s: float, on_silent: Callable[[], None]) -> Watch | None:
    """Watch the process whose pulse is at `host:port`; None: it cannot be reached there, so nothing can be told.

    Raises TransportError for a process that is there and does not answer: it is stopped.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, found = await loop.create_connection(lambda: Watch(silence_s, on_silent), host.strip("[]"), int(port))
    except (OSError, ValueError):  # a TimeoutError too
        return None
    try:
        async with asyncio.timeout(FIRST_ANSWER_S):
            await asyncio.wait((found.answered,))
    except TimeoutError:
        found.close()
    except asyncio.CancelledError:
        found.close()
        raise
    if found.answered.cancelled():
        raise TransportError("the instance's process does not run: it is stopped or hangs, or has died")
    return found

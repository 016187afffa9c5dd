"""Heartbeats: detect stopped processes with a one-byte echo, over a connection beside the RPC connection.

A process that was stopped (SIGSTOP, a frozen container) keeps its connections, so its clients would wait without end. A
thread echoes, not the event loop: a handler that blocks the loop for a minute is slow, not dead.
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
HEARTBEAT_CONNECT_TIMEOUT_S = 1.0
FIRST_ECHO_TIMEOUT_S = 2.0


class Heartbeat:
    """The server's end: echoes in a thread until `close`.

    It listens on `host`; `address` names the host that clients connect to, `advertised` if given. Raises TransportError.
    """

    def __init__(self, host: str, advertised: str = "") -> None:
        self._listener = listening_socket(host)
        self.address = f"{advertised or host}:{self._listener.getsockname()[1]}"
        self._closing, closed = socket.socketpair()
        self._thread = threading.Thread(target=self._echo, args=(closed,), name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close all connections and wait for the thread's end."""
        self._closing.close()
        self._thread.join()

    def _echo(self, closed: socket.socket) -> None:
        clients: set[socket.socket] = set()
        with selectors.DefaultSelector() as selector, self._listener as listener, closed:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(closed, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    ready = cast(socket.socket, key.fileobj)
                    if ready is closed:
                        for client in clients:
                            client.close()
                        return
                    if ready is listener:
                        with contextlib.suppress(OSError):  # the client disconnected, or no descriptors are left
                            client, _ = listener.accept()
                            client.setblocking(False)
                            selector.register(client, selectors.EVENT_READ)
                            clients.add(client)
                    elif not _echo_to(ready):
                        selector.unregister(ready)
                        clients.discard(ready)
                        ready.close()


def _echo_to(client: socket.socket) -> bool:
    """Answer the bytes that are there with one byte. False if the client has disconnected."""
    try:
        received = client.recv(64)
        if received:
            client.send(b".")
    except BlockingIOError:  # the client does not read its echoes
        return True
    except OSError:
        return False
    return bool(received)


class HeartbeatMonitor(asyncio.Protocol):
    """The client's end: sends a byte every BEAT_S and calls `on_silent`, once, after `silence_s` without an echo.

    It counts unanswered beats, not seconds: this process may have been stopped itself. Losing this connection
    does not count: if the process died, its RPC connection is lost too.
    """

    def __init__(self, silence_s: float, on_silent: Callable[[], None]) -> None:
        self._max_unanswered = max(math.ceil(silence_s / BEAT_S), 1)
        self._on_silent = on_silent
        self._loop = asyncio.get_running_loop()
        self._unanswered = 0
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.first_echo: asyncio.Future[None] = self._loop.create_future()
        """done at the first echo; cancelled when the monitor closes before it"""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._beat()

    def data_received(self, data: bytes) -> None:
        self._unanswered = 0
        if not self.first_echo.done():
            self.first_echo.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop monitoring. `on_silent` is not called any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self.first_echo.cancel()

    def _beat(self) -> None:
        if self._unanswered >= self._max_unanswered:
            has_echoed = self.first_echo.done()
            self.close()
            if has_echoed:
                self._on_silent()
        elif self._transport is not None:
            self._unanswered += 1
            self._transport.write(b"?")
            self._timer = self._loop.call_later(BEAT_S, self._beat)


async def monitor(address: str, silence_s: float, on_silent: Callable[[], None]) -> HeartbeatMonitor | None:
    """Monitor the process whose heartbeat is at `host:port`. None if that cannot be reached, so cannot be monitored.

    Raises TransportError if the process accepts the connection and does not echo: it is stopped.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(HEARTBEAT_CONNECT_TIMEOUT_S):
            _, found = await loop.create_connection(
                lambda: HeartbeatMonitor(silence_s, on_silent), host.strip("[]"), int(port)
            )
    except (OSError, ValueError):  # TimeoutError is an OSError
        return None
    try:
        async with asyncio.timeout(FIRST_ECHO_TIMEOUT_S):
            await asyncio.wait((found.first_echo,))
    except TimeoutError:
        found.close()
    except asyncio.CancelledError:
        found.close()
        raise
    if found.first_echo.cancelled():
        raise TransportError("the instance's process does not run: it is stopped, hangs or has died")
    return found

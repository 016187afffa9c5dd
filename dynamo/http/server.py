"""uvicorn inside a process that has an event loop and signal handlers of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

from dynamo.errors import StartError, TransportError
from dynamo.http import write_coalescing
from dynamo.transport.network import listening_at, listening_socket

KEEP_ALIVE_S = 75
DRAIN_S = 20
BACKLOG = 2048
START_POLL_S = 0.005


class _EmbeddedUvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process; uvicorn would install handlers here."""
        yield


def listen(host: str, port: int | None, *, shared: bool = False) -> socket.socket:
    """Return a listening socket, on a random free port of `STREAM_PORTS` when `port` is None or 0.

    With `shared`, several sockets may listen on the port, and the kernel spreads connections over them. Raises StartError
    when the port is taken.
    """
    try:
        if port:
            listener = listening_at(host, port, BACKLOG, reuse_port=shared)
        else:
            listener = listening_socket(host, BACKLOG, reuse_port=shared)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="choose another port: `port` in the service's configuration, or --port",
        ) from None
    except TransportError as error:
        raise StartError(error.message, hint="give the service a `port` in the configuration") from None
    # Connections inherit it. asyncio sets it only where the socket names its protocol, which create_server's does not,
    # and without it small writes wait 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class HttpServer:
    """Serves an ASGI application from `start` until `stop`."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        listener: socket.socket | None = None,
        *,
        lifespan: Literal["auto", "off"] = "off",
    ) -> None:
        """
        Args:
            app: the application.
            host: address to listen on.
            port: port to listen on.
            listener: a socket that listens there already; None: `start` opens one.
            lifespan: "auto" runs the application's own start and shutdown handlers.
        """
        self.host = host
        self.port = port
        self._listener = listener
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            loop="none",
            http=write_coalescing.protocol(),
            proxy_headers=False,  # nothing here uses the client's address
            ws="none",
            lifespan=lifespan,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
            server_header=False,
        )
        self._server = _EmbeddedUvicorn(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to accept connections. Raises StartError when the port is taken or the application's start failed."""
        listener = self._listener or listen(self.host, self.port)
        self._task = asyncio.get_running_loop().create_task(self._server.serve([listener]), name="http server")
        while not self._server.started:
            if self._task.done():
                raise StartError(f"the HTTP server did not start on {self.host}:{self.port}", hint="read its log above")
            await asyncio.sleep(START_POLL_S)

    @property
    def url(self) -> str:
        """The URL for clients on this host."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def stop(self) -> None:
        """Accept nothing new, let running responses end for up to `DRAIN_S`, then close."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task

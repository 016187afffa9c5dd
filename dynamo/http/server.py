"""uvicorn inside a process that has an event loop and signal handlers of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from dynamo.errors import StartError
from dynamo.http import write_coalescing

KEEP_ALIVE_S = 75
DRAIN_S = 20
BACKLOG = 2048


class _Embedded(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process handles signals, not uvicorn."""
        yield


def listening(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that listens there; `shared`: with others that share it, the kernel spreads connections over them."""
    anywhere = host == "::"  # all addresses, IPv4 too
    listener = socket.create_server(
        ("" if anywhere else host, port),
        family=socket.AF_INET6 if ":" in host else socket.AF_INET,
        backlog=BACKLOG,
        reuse_port=shared,
        dualstack_ipv6=anywhere,
    )
    # connections inherit it; asyncio sets it only where the socket names its protocol, which create_server's does not,
    # and without it small writes wait 40 ms for an acknowledgement
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class HttpServer:
    """Serves an ASGI app from `start` until `stop`."""

    def __init__(self, app: ASGIApp, host: str, port: int, listener: socket.socket | None = None) -> None:
        """`listener`: listens there already."""
        self.host, self.port = host, port
        self._listener = listener
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            loop="none",
            http=write_coalescing.protocol(),
            proxy_headers=False,  # nothing here asks for the client's address
            ws="none",
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
            server_header=False,
        )
        self._server = _Embedded(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listening when it returns. Raises StartError when the port is taken."""
        try:
            listener = self._listener or listening(self.host, self.port)
        except OSError as error:
            raise StartError(
                f"cannot listen on {self.host}:{self.port}: {error.strerror}", hint="choose another port with --port"
            ) from None
        self._task = asyncio.get_running_loop().create_task(self._server.serve([listener]), name="http server")
        while not self._server.started:
            if self._task.done():
                raise StartError(f"the HTTP server did not start on {self.host}:{self.port}")
            await asyncio.sleep(0.005)

    @property
    def url(self) -> str:
        """Where a client on this host reaches it."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def stop(self) -> None:
        """Accept nothing new, let running answers end for up to `DRAIN_S`, then close."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task

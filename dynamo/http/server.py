"""uvicorn inside a process that has an event loop and signal handlers of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from dynamo.errors import StartError

KEEP_ALIVE_S = 75
DRAIN_S = 20


class _Embedded(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process handles signals, not uvicorn."""
        yield


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class HttpServer:
    """Serves an ASGI app from `start` until `stop`."""

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        self.host, self.port = host, port
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            loop="none",
            http="httptools",
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
            listener = socket.create_server((self.host, self.port), family=_family(self.host), backlog=2048)
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

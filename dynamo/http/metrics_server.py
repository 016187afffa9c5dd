"""The metrics port of a host: GET /metrics and GET /metrics/targets, and nothing else."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo.http.prometheus_text import CONTENT_TYPE, Pages
from dynamo.http.server import HttpServer

log = logging.getLogger(__name__)


class MetricsServer(HttpServer):
    """On sockets that listen already. Pages are Prometheus text, those whose path ends in `/targets` JSON."""

    def __init__(self, listeners: Sequence[socket.socket], pages: Pages) -> None:
        super().__init__(_app(pages), *listeners[0].getsockname()[:2])
        self._listeners = listeners

    async def serve(self) -> None:
        """Until cancelled."""
        await self._server.serve(list(self._listeners))


def _app(pages: Pages) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        path, status, kind = scope["path"], 200, CONTENT_TYPE
        page = pages.get(path)
        if page is None:
            status, body = 404, f"see {' and '.join(pages)}\n".encode()
        elif scope["method"] not in ("GET", "HEAD"):
            status, body = 405, b"only GET is allowed\n"
        else:
            try:
                body = await page()
            except Exception:
                log.exception("%s cannot be told", path)
                status, body = 500, b"the log of dynamo serve tells why\n"
        if status == 200 and path.endswith("/targets"):
            kind = "application/json"
        headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer

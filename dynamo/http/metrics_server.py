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
    """Serves pages on listening sockets: Prometheus text, and JSON for paths that end in `/targets`."""

    def __init__(self, listeners: Sequence[socket.socket], pages: Pages) -> None:
        super().__init__(_app(pages), *listeners[0].getsockname()[:2])
        self._listeners = listeners

    async def serve(self) -> None:
        """Serve until cancelled."""
        await self._server.serve(list(self._listeners))


def _app(pages: Pages) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        status = 200
        content_type = CONTENT_TYPE
        page = pages.get(path)
        if page is None:
            status, body = 404, f"see {' and '.join(pages)}\n".encode()
        elif scope["method"] not in ("GET", "HEAD"):
            status, body = 405, b"only GET is allowed\n"
        else:
            try:
                body = await page()
            except Exception:
                log.exception("failed to serve %s", path)
                status, body = 500, b"this page failed: see the log of dynamo serve\n"
        if status == 200 and path.endswith("/targets"):
            content_type = "application/json"
        headers = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer

"""The unix socket on which a process serves its metrics to the supervisor of its host, independent of NATS and etcd.

A request is one line, the path of a page; the response is a line with the size in bytes, then the page. The size lets the
reader drop the partial page of a process that was killed meanwhile, which would corrupt the text of all processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo.http.prometheus_text import Pages

log = logging.getLogger(__name__)

ASK_S = 2.0
"""Longest wait for a process, which may be stopped or very busy."""

METRICS, TARGETS = "/metrics", "/metrics/targets"


def path_of(run_dir: Path, process: str) -> Path:
    """Return the path of a process's socket."""
    return run_dir / f"{process}.metrics"


class MetricsSocket:
    """Serves pages, by path, on a unix socket."""

    def __init__(self, path: Path, pages: Pages) -> None:
        self._path = path
        self._pages = pages
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen; replace the socket that a dead process of the same name left behind."""
        try:
            self._path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._answer, self._path)
        except OSError as error:  # such as a path of more than 107 bytes
            log.warning("the metrics port will not include this process: %s: %s", self._path, error)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ASK_S):
                page = self._pages.get((await reader.readline()).decode(errors="replace").strip())
                if page is not None:
                    found = await page()
                    writer.write(b"%d\n%b" % (len(found), found))
                    await writer.drain()
        except (OSError, TimeoutError) as error:
            log.debug("metrics not sent: %r", error)
        except Exception:  # raised by a component's collector
            log.exception("failed to render this process's metrics")
        finally:
            writer.close()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)


async def ask(path: Path, page: str) -> bytes:
    """Return a page of the process at `path`; empty if it does not respond within `ASK_S`."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(ASK_S):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(f"{page}\n".encode())
            size = await reader.readline()
            return await reader.readexactly(int(size)) if size else b""
    except (OSError, EOFError, TimeoutError) as error:
        log.debug("%s: %r", path.name, error)
        return b""
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

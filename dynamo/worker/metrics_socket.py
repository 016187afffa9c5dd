"""The unix socket on which a process tells the supervisor of its host what it counts, also while NATS and etcd are away.

A connection asks with one line, the path of a page, and gets a line with its size in bytes, and the page: half a page, of
a process that is killed meanwhile, would spoil the text of all.
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
"""The longest that anybody waits for a process, which may be stopped or very busy."""

METRICS, TARGETS = "/metrics", "/metrics/targets"


def path_of(run_dir: Path, process: str) -> Path:
    return run_dir / f"{process}.metrics"


class MetricsSocket:
    def __init__(self, path: Path, pages: Pages) -> None:
        self._path, self._pages = path, pages
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """From now on the event loop answers. What a process of that name that died left there is replaced."""
        try:
            self._path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._answer, self._path)
        except OSError as error:  # such as a path of more than 107 bytes
            log.warning("the metrics port does not show this process: %s: %s", self._path, error)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ASK_S):
                page = self._pages.get((await reader.readline()).decode(errors="replace").strip())
                if page is not None:
                    found = await page()
                    writer.write(b"%d\n%b" % (len(found), found))
                    await writer.drain()
        except (OSError, TimeoutError) as error:
            log.debug("not told: %r", error)
        except Exception:  # a collector of a component's own
            log.exception("the metrics of this process cannot be told")
        finally:
            writer.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)


async def ask(path: Path, page: str) -> bytes:
    """What the process at `path` tells; empty from one that does not answer in `ASK_S`."""
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

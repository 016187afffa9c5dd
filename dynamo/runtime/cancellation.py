"""`CancellationToken` of the 0.x binding."""

from __future__ import annotations

import asyncio

from dynamo.rpc.runtime import Runtime


class CancellationToken:
    """Is cancelled by `cancel`, and when the runtime stops. Cancelling the primary one stops the runtime."""

    def __init__(self, runtime: Runtime, *, primary: bool = False) -> None:
        self._runtime = runtime
        self._primary = primary
        self._cancelled = asyncio.Event()

    def cancel(self) -> None:
        self._cancelled.set()
        if self._primary:
            self._runtime.shutdown()

    async def cancelled(self) -> None:
        """Wait until it is cancelled."""
        waits = [asyncio.ensure_future(wait) for wait in (self._cancelled.wait(), self._runtime.stopped())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

"""Services that handle SIGTERM themselves, as components of 0.x do: by `sys.exit`, and by stopping the event loop."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel

from dynamo.sdk import api, async_on_start, depends, endpoint, service


class Text(BaseModel):
    text: str


@service(dynamo={"namespace": "signals"})
class Slow:
    @async_on_start
    async def handle(self) -> None:
        signal.signal(signal.SIGTERM, self.clean_up)

    def clean_up(self, number: int, frame: object) -> None:
        print("Slow cleans up", flush=True)
        asyncio.get_event_loop().stop()

    @endpoint()
    async def generate(self, request: Text) -> AsyncIterator[Any]:
        for index in range(10):
            yield f"{request.text}{index} "
            await asyncio.sleep(0.2)


@service(dynamo={"namespace": "signals"})
class Frontend:
    slow = depends(Slow)

    def __init__(self) -> None:
        signal.signal(signal.SIGTERM, self.clean_up)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def clean_up(self, number: int, frame: object) -> None:
        print("Frontend cleans up", flush=True)
        sys.exit(0)

    @api()
    async def generate(self, request: Text) -> AsyncIterator[str]:
        async for item in self.slow.generate(request):
            yield item

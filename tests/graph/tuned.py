"""A graph with live settings: `Front` asks each `Voice` how it speaks."""

from __future__ import annotations

import asyncio
from typing import Literal

from dynamo.sdk import Service, api, depends, direct, endpoint, in_flight, instance_ids, power_of_two, service


@service(dynamo={"namespace": "tuned"}, workers=2)
class Voice(Service):
    live_settings = ("mode", "max-words")

    def __init__(self, mode: Literal["loud", "quiet"] = "quiet", max_words: int = 3) -> None:
        self.mode, self.max_words = mode, max_words

    @endpoint
    async def how(self) -> str:
        return f"{self.mode} {self.max_words}"

    @endpoint
    async def pause(self, seconds: float) -> bool:
        await asyncio.sleep(seconds)
        return True


@service(dynamo={"namespace": "tuned"})
class Front(Service):
    voice = depends(Voice)

    @api
    async def ask(self) -> list[str]:
        return [await direct(self.voice, one).how() for one in instance_ids(self.voice)]

    @api
    async def busy(self) -> list[list[int]]:
        """Calls in flight at each Voice while one of them pauses, and afterwards."""
        pausing = power_of_two(self.voice).pause(0.3)
        await asyncio.sleep(0.1)
        during = sorted(in_flight(self.voice).values())
        await pausing
        return [during, sorted(in_flight(self.voice).values())]

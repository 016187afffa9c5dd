"""Topics and work queues between the processes of a graph."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx

from tests.served import Start

GRAPH = """
import asyncio
import os
import signal
import msgspec
from dynamo.sdk import Service, Topic, WorkQueue, api, async_on_start, depends, on_shutdown, service


class Done(msgspec.Struct):
    number: int
    tries: int


class Base(Service):
    tasks = WorkQueue(int, lost_after_s=1.0)
    ended = Topic(Done)


@service(workers=2)
class Worker(Base):
    @async_on_start
    async def start(self) -> None:
        self.working = asyncio.create_task(self.work())

    async def work(self) -> None:
        async for job in self.tasks.take(limit=8):
            if job.task < 0 and job.tries == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            async with job:
                await self.ended.publish(Done(job.task, job.tries))

    @on_shutdown
    async def stop(self) -> None:
        await self.working
        print("stopped working")


@service
class Front(Service):
    worker = depends(Worker)

    @async_on_start
    async def start(self) -> None:
        self.done: dict[int, int] = {}
        await self.worker.ended.subscribe(self.on_done)

    def on_done(self, done: Done) -> None:
        self.done[done.number] = done.tries

    @api
    async def put(self, numbers: list[int]) -> int:
        for number in numbers:
            await self.worker.tasks.put(number)
        return await self.worker.tasks.size()

    @api
    async def ended(self) -> dict[str, int]:
        return {str(number): tries for number, tries in self.done.items()}
"""


def test_tasks_go_to_workers_and_messages_come_back(serve_graph: Start, tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(GRAPH)
    served = serve_graph(graph="jobs:Front", cwd=tmp_path).ready()

    def wait_for(expected: dict[str, int]) -> None:
        deadline = time.monotonic() + 20
        while (found := httpx.post(f"{served.url}/ended").json()) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    expected = {str(number): 1 for number in range(20)}
    assert httpx.post(f"{served.url}/put", json=list(range(20))).status_code == 200
    wait_for(expected)
    httpx.post(f"{served.url}/put", json=[-1])
    wait_for(expected | {"-1": 2})  # by the other worker, after the first has died of it
    served.wait_for(re.compile(r"restarting(.|\n)*Worker:\d ready"), 20)
    assert served.stop() == 0
    assert served.output.count("stopped working") == 2

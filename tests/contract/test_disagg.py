"""The length of the prefill queue as a decode worker sees it, without tasks in hand. On real JetStream."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from tests.contract.rpc_steps import Make, make, namespace
from tests.contract.test_work_queue import Task, front_on, worker_on

__all__ = ["make", "namespace"]  # fixtures


async def test_waiting_counts_tasks_that_no_worker_has_taken(make: Make, namespace: str) -> None:
    front = front_on(await make(), namespace)
    worker = worker_on(await make(), namespace)
    assert await front.worker.tasks.waiting() == 0
    for number in range(5):
        await front.worker.tasks.put(Task(number))

    async def waiting(expected: int) -> None:
        async with asyncio.timeout(5):
            while await front.worker.tasks.waiting() != expected:
                await asyncio.sleep(0.005)

    await waiting(5)
    async with aclosing(worker.tasks.take(2)) as jobs:
        held = [await anext(jobs), await anext(jobs)]
        await waiting(3)
        assert await front.worker.tasks.size() == 5
        for job in held:
            await job.done()

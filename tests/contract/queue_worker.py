"""A process to kill: takes tasks of `Worker.tasks`, prints their numbers, and finishes none. See test_work_queue."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from dynamo.rpc.runtime import Runtime
from dynamo.sdk.channels import attach
from dynamo.worker.broker import ServiceBroker
from tests.contract.test_work_queue import Worker


async def main(nats: str, etcd: str, namespace: str, limit: str) -> None:
    worker = Worker()
    runtime = Runtime(nats_url=nats, etcd_endpoints=etcd)
    attach(worker, ServiceBroker(runtime, namespace, "Worker"))
    held = []
    async for job in worker.tasks.take(int(limit)):
        held.append(job)
        print(job.task.number, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))

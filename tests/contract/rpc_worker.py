"""A process to kill: serves `generate` (numbers without end) and `pid`. Arguments: NATS, etcd, namespace, run directory."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from dynamo.rpc.runtime import Runtime


async def generate(pause_s: float) -> AsyncIterator[int]:
    for i in itertools.count():
        yield i
        await asyncio.sleep(pause_s)


async def pid(_: None) -> int:
    return os.getpid()


async def main(nats: str, etcd: str, namespace: str, run_dir: str) -> None:
    runtime = Runtime(nats_url=nats, etcd_endpoints=etcd, run_dir=Path(run_dir), name="worker")
    await runtime.serve(namespace, "Worker", "generate", generate, float)
    await runtime.serve(namespace, "Worker", "pid", pid, type(None))
    print(runtime.instance_id, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))

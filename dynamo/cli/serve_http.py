"""The OpenAI server in the foreground of a command, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import uvloop

from dynamo.cli.deployments import single_deployment
from dynamo.environment import api_keys
from dynamo.errors import EngineError
from dynamo.http.server import HttpServer
from dynamo.launcher.serve_plan import reach
from dynamo.openai.app import create_app
from dynamo.openai.backend import Backend
from dynamo.openai.registered_models import RegisteredModels
from dynamo.rpc.runtime import Runtime
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)

IN_GRAPH = "DYNAMO_PROCESS"
"""set in the processes of a graph, and in those that they start"""
PARENT_POLL_S = 0.5
HEALTH_POLL_S = 1.0


def connections(name: str) -> Runtime:
    """Return the connections to NATS and etcd: those of the environment, else of the graph that runs on this machine.

    Raises StartError if several graphs run here, each with servers of its own.
    """
    if os.environ.get("NATS_SERVER") or os.environ.get("ETCD_ENDPOINTS"):
        return Runtime(name=name)
    found = single_deployment()
    return Runtime(nats_url=found.nats_url, etcd_endpoints=found.etcd_endpoints, name=name)


def run_loop(work: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine, and return the exit code that it returns."""
    code: int = uvloop.run(work)
    return code


async def serve_registered(host: str, port: int, choice: str, started: float) -> int:
    """Serve the models that processes register in etcd; return the exit code.

    Raises TransportError if etcd or NATS cannot be reached, StartError if the port is taken.
    """
    runtime = connections("http")
    models = RegisteredModels(runtime, choice)
    tasks = TaskSet("http")
    try:
        await runtime.connect()
        tasks.spawn(models.follow(), name="follow models")
        return await serve(models, host, port, started, missing=models.missing, runtime=runtime)
    finally:
        await tasks.aclose()
        await models.aclose()
        await runtime.close()


async def serve(
    backend: Backend,
    host: str,
    port: int,
    started: float,
    *,
    missing: Callable[[str], str] | None = None,
    check_health: Callable[[], Awaitable[Any]] | None = None,
    runtime: Runtime | None = None,
) -> int:
    """Serve a backend as long as `until_stopped` says; return the exit code."""
    server = HttpServer(create_app(backend, api_keys=api_keys(), missing=missing), host, port)
    await server.start()
    print(f"ready in {time.monotonic() - started:.1f} s: {server.url}", flush=True)
    print(reach(host, has_keys=bool(api_keys())), file=sys.stderr)
    try:
        return await until_stopped(check_health, runtime)
    finally:
        await server.stop()


async def until_stopped(
    check_health: Callable[[], Awaitable[Any]] | None = None, runtime: Runtime | None = None
) -> int:
    """Wait for SIGINT or SIGTERM, or for the end of the service that started this process; return the exit code.

    It is 1 if `check_health` raised EngineError or another process revoked the lease of `runtime`, else 0.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    parent = os.getppid() if os.environ.get(IN_GRAPH) else None
    checked_at = time.monotonic()
    while not stopping.is_set():
        try:
            await asyncio.wait_for(stopping.wait(), PARENT_POLL_S)
        except TimeoutError:
            pass
        if parent is not None and os.getppid() != parent:
            return 0
        if runtime is not None and runtime.is_stopped:
            log.error("the lease was revoked")
            return 1
        if check_health is not None and time.monotonic() - checked_at > HEALTH_POLL_S:
            checked_at = time.monotonic()
            try:
                await check_health()
            except EngineError as error:
                log.error("%s", error)
                return 1
    return 0

"""Changing how many workers a service has: the verbs, and the client of the supervisor that carries them out.

    worker = await scaler.add("VllmWorker")                # returns when it is ready
    await scaler.remove("VllmWorker")                      # the youngest one, drained first
    await scaler.remove("VllmWorker", worker.name)
    states = await scaler.services()

`SupervisorClient` reaches the `dynamo serve` of a run directory over a unix socket there: one line of JSON for each request
and one for the answer. Its directory is readable by its user alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from dynamo.errors import UnavailableError
from dynamo.rpc.remote_errors import Failure, unpack

LIST_TIMEOUT_S = 2.0
MAX_LINE_BYTES = 1 << 20


class WorkerInfo(msgspec.Struct, frozen=True):
    """One worker of a service. `pid` None: its process is not running now. `progress`: what a start is waiting for."""

    name: str
    state: Literal["starting", "ready", "draining", "restarting"]
    pid: int | None = None
    gpus: list[str] = []
    restarts: int = 0
    progress: str = ""


class ServiceInfo(msgspec.Struct, frozen=True):
    """A service and its workers, oldest first. `planned`: how many of them it was started with."""

    namespace: str
    name: str
    planned: int
    workers: list[WorkerInfo] = []

    @property
    def ready(self) -> int:
        """Return how many workers are ready."""
        return sum(worker.state == "ready" for worker in self.workers)

    @property
    def wanted(self) -> int:
        """Return how many workers there are, without those that are being removed."""
        return sum(worker.state != "draining" for worker in self.workers)


class Scaler(Protocol):
    """Changes the number of workers of services, wherever their processes run.

    Methods raise ConfigError for a request that makes no sense, UnavailableError while the graph starts, stops, or does not
    answer.
    """

    async def services(self) -> list[ServiceInfo]:
        """Return the services that can be scaled."""
        ...

    async def add(self, service: str) -> WorkerInfo:
        """Start one more worker; return when it is ready.

        Raises ConfigError if no GPU is free for it, StartError if it does not become ready.
        """
        ...

    async def remove(self, service: str, worker: str = "") -> WorkerInfo:
        """Drain a worker, the one of that name or the youngest, and end it; return when it has ended.

        Raises ConfigError for the last worker that is ready.
        """
        ...


class Request(msgspec.Struct):
    """A line to the supervisor."""

    verb: Literal["list", "add", "remove"]
    service: str = ""
    worker: str = ""


class Reply(msgspec.Struct):
    """The supervisor's answer, with one of its fields set."""

    services: list[ServiceInfo] | None = None
    worker: WorkerInfo | None = None
    failure: Failure | None = None


def path_of(run_dir: Path) -> Path:
    """Return the path of a supervisor's socket."""
    return run_dir / "scaling"


class SupervisorClient:
    """A `Scaler` of the processes of one `dynamo serve` on this machine."""

    def __init__(self, run_dir: Path) -> None:
        self._path = path_of(run_dir)

    async def services(self) -> list[ServiceInfo]:
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                return (await self._ask(Request("list"))).services or []
        except TimeoutError:
            raise UnavailableError(f"the supervisor did not answer within {LIST_TIMEOUT_S:g} s") from None

    async def add(self, service: str) -> WorkerInfo:
        return _worker(await self._ask(Request("add", service)))

    async def remove(self, service: str, worker: str = "") -> WorkerInfo:
        return _worker(await self._ask(Request("remove", service, worker)))

    async def _ask(self, request: Request) -> Reply:
        """Send a request and wait for the answer, however long a worker's start takes: the connection ends with the graph."""
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_unix_connection(self._path, limit=MAX_LINE_BYTES)
            writer.write(msgspec.json.encode(request) + b"\n")
            reply = msgspec.json.decode(await reader.readline(), type=Reply)
        except (OSError, ValueError) as error:  # no socket, a supervisor that has ended, or another version's line
            raise UnavailableError(f"no answer from the supervisor: {error}", hint="see `dynamo status`") from None
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        if reply.failure is not None:
            raise unpack(reply.failure)
        return reply


def _worker(reply: Reply) -> WorkerInfo:
    if reply.worker is None:
        raise UnavailableError("the supervisor's answer has no worker: it is of another version")
    return reply.worker

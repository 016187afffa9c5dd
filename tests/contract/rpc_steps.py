"""Steps and fixtures shared by the tests of the runtime; import the fixtures to use them."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from dynamo import codec
from dynamo.rpc.client import Client
from dynamo.rpc.runtime import Runtime

decode_any = codec.decoder(Any)


class Make(Protocol):
    async def __call__(self, *, run_dir: Path | None = ...) -> Runtime: ...


def call(client: Client, request: Any, choice: str | int = "round_robin", *, streaming: bool = True) -> Any:
    return client.call(request, choice, decode=decode_any, streaming=streaming)


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


async def soon(condition: Callable[[], Any], seconds: float = 2.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture(params=["tcp", "nats"])
def plane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The request plane: the test runs once on each."""
    monkeypatch.setenv("DYN_REQUEST_PLANE", request.param)
    return str(request.param)


@pytest.fixture
def namespace() -> str:
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def make(nats_server: str, etcd_server: str) -> AsyncIterator[Make]:
    """A function that makes connected runtimes, with a unix socket unless `run_dir` is None; they are closed at the end."""
    made: list[Runtime] = []
    with tempfile.TemporaryDirectory() as short:  # a socket's path may have 107 bytes

        async def make(*, run_dir: Path | None = Path(short)) -> Runtime:
            runtime = Runtime(nats_url=nats_server, etcd_endpoints=etcd_server, run_dir=run_dir, name="callee")
            await runtime.connect()
            made.append(runtime)
            return runtime

        yield make
        await asyncio.gather(*(runtime.close() for runtime in made))

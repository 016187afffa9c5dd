"""The unix socket on which a supervisor is asked to add and remove workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from dynamo.errors import ConfigError, RemoteError, RequestError, UnavailableError
from dynamo.launcher.scaling import serve
from dynamo.planner.scaling import Reply, ServiceInfo, SupervisorClient, WorkerInfo, path_of
from dynamo.rpc.remote_errors import unpack

ECHO = ServiceInfo("ns", "Echo", 1, [WorkerInfo("Echo", "ready", 7, ["3"], 2), WorkerInfo("Echo:2", "draining", 8)])


class Scaler:
    """Answers at once, except that adding `Slow` never ends."""

    async def services(self) -> list[ServiceInfo]:
        return [ECHO]

    async def add(self, service: str) -> WorkerInfo:
        if service == "Slow":
            await asyncio.Event().wait()
        if service == "Bug":
            raise ZeroDivisionError("a bug")
        return WorkerInfo(f"{service}:2", "ready")

    async def remove(self, service: str, worker: str = "") -> WorkerInfo:
        raise ConfigError(f"{worker or service} stays", hint="let it")


@asynccontextmanager
async def serving(run_dir: Path) -> AsyncIterator[SupervisorClient]:
    task = asyncio.create_task(serve(path_of(run_dir), Scaler()))
    async with asyncio.timeout(10):
        while not path_of(run_dir).exists():
            await asyncio.sleep(0.001)
    yield SupervisorClient(run_dir)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def ask(run_dir: Path, line: bytes) -> Reply:
    reader, writer = await asyncio.open_unix_connection(path_of(run_dir))
    writer.write(line)
    reply = msgspec.json.decode(await reader.readline(), type=Reply)
    writer.close()
    return reply


async def test_the_verbs(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        assert await client.services() == [ECHO]
        assert (ECHO.ready, ECHO.wanted) == (1, 1)
        assert await client.add("Echo") == WorkerInfo("Echo:2", "ready")
        with pytest.raises(ConfigError, match="Echo:2 stays") as error:
            await client.remove("Echo", "Echo:2")
        assert error.value.hint == "let it"


@pytest.mark.parametrize("line", [b"add Echo\n", b'{"verb": "grow"}\n', b"[]\n", b"\xff\n", b"\n"])
async def test_another_line_is_refused(tmp_path: Path, line: bytes) -> None:
    async with serving(tmp_path):
        reply = await ask(tmp_path, line)
        assert reply.failure is not None
        error = unpack(reply.failure)
        assert isinstance(error, RequestError)
        assert error.message.startswith("not a request to scale: ")


async def test_a_bug_is_logged_and_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as client:
        with pytest.raises((ZeroDivisionError, RemoteError), match="a bug"):
            await client.add("Bug")
        assert "add Bug failed" in caplog.text
        assert await client.services() == [ECHO]


async def test_requests_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        slow = asyncio.create_task(client.add("Slow"))
        await asyncio.sleep(0)
        assert await client.services() == [ECHO]
        assert not slow.done()
        slow.cancel()


async def test_without_a_supervisor(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no answer from the supervisor: .*No such file"):
        await SupervisorClient(tmp_path).services()


async def test_a_path_that_is_too_long_leaves_the_graph_running(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await serve(tmp_path / ("x" * 120), Scaler())
    assert "the graph cannot be scaled while it runs" in caplog.text

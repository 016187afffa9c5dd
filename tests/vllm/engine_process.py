"""vLLM engines in processes of their own, for tests and benchmarks that need several: `Engines` starts them.

Run as a script, it is one of those processes; a `ForkServer` runs `serve` in forks.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import socket
import sys
from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.streams import Stream
from tests.vllm.fork_server import ForkServer

ROOT = Path(__file__).parents[2]
LINE_BYTES = 1 << 24
STOP_S = 60.0


class EngineFailureError(Exception):
    """An error that an engine answered with: its class and text."""


class EngineProcess:
    """Client of one engine process. `pid` is the process's id, `core` its engine core's, `info` its EngineInfo."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self.pid = 0
        self.core = 0
        self.info: list[int] = []

    async def started(self) -> None:
        hello = json.loads(await self._reader.readline() or b"{}")
        assert hello.get("pid"), f"the engine did not start: {hello}"
        self.pid = hello["pid"]
        self.core = hello["core"]
        self.info = hello["info"]
        self._answers = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while line := await self._reader.readline():
            answer = json.loads(line)
            waiter = self._asked.pop(answer["number"])
            if waiter.done():
                continue
            if "error" in answer:
                waiter.set_exception(EngineFailureError(answer["error"]))
            else:
                waiter.set_result(answer["result"])
        for waiter in self._asked.values():
            if not waiter.done():
                waiter.set_exception(EngineFailureError("the engine process ended"))

    async def ask(self, what: str, **more: Any) -> Any:
        """Send a request and return its result. Cancelling it cancels the engine's work."""
        number = next(self._numbers)
        waiter = self._asked[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps({"what": what, "number": number, **more}).encode() + b"\n")
        try:
            async with asyncio.timeout(90):
                return await waiter
        except asyncio.CancelledError:
            self._writer.write(json.dumps({"what": "cancel", "number": number}).encode() + b"\n")
            raise

    async def generate(
        self, tokens: list[int], max_tokens: int = 12, kv_transfer: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return `tokens`, `logprobs` and `cached` of a greedy answer."""
        found: dict[str, Any] = await self.ask("generate", tokens=tokens, max_tokens=max_tokens, kv=kv_transfer)
        return found

    async def prefill(self, tokens: list[int]) -> dict[str, Any]:
        found: dict[str, Any] = await self.ask("prefill", tokens=tokens)
        return found

    async def state(self) -> dict[str, Any]:
        """Return the engine's `stats`, `transferred`, and the numbers of its `tasks` and `events`."""
        found: dict[str, Any] = await self.ask("state")
        return found

    def close(self) -> None:
        self._writer.close()


class Engines:
    """Engine processes by name, as a context manager. A configuration has `model`, `arguments` and `environment`.

    They are forks of `server`; without one, each is started by itself.
    """

    def __init__(self, configurations: Mapping[str, Mapping[str, Any]], server: ForkServer | None = None) -> None:
        self._configurations = configurations
        self._server = server
        self._forks: list[int] = []
        self._processes: list[asyncio.subprocess.Process] = []
        self.by_name: dict[str, EngineProcess] = {}

    async def __aenter__(self) -> dict[str, EngineProcess]:
        for name, configuration in self._configurations.items():
            ours, theirs = socket.socketpair()
            with theirs:
                await self._start(configuration, theirs.fileno())
            self.by_name[name] = EngineProcess(*await asyncio.open_connection(sock=ours, limit=LINE_BYTES))
        await asyncio.gather(*(engine.started() for engine in self.by_name.values()))
        return self.by_name

    async def _start(self, configuration: Mapping[str, Any], fd: int) -> None:
        environment = configuration.get("environment", {})
        if self._server is not None:
            serve_it = "tests.vllm.engine_process:serve"
            self._forks.append(self._server.start(serve_it, configuration, fds=[fd], environment=environment))
            return
        command = (sys.executable, "-m", "tests.vllm.engine_process", json.dumps(configuration), str(fd))
        env = {**os.environ, **environment}
        self._processes.append(await asyncio.create_subprocess_exec(*command, pass_fds=[fd], cwd=ROOT, env=env))

    async def __aexit__(self, *_: object) -> None:
        for engine in self.by_name.values():
            engine.close()
        for process in self._processes:
            await process.wait()
        for fork in self._forks:
            await asyncio.to_thread(self._server.wait, fork, STOP_S)  # type: ignore[union-attr]


async def serve(configuration: Mapping[str, Any], fd: int) -> None:
    from dynamo.engines.vllm.engine import VllmEngine
    from dynamo.engines.vllm.process import child_pids

    connection = socket.socket(fileno=fd)
    reader, writer = await asyncio.open_connection(sock=connection, limit=LINE_BYTES)
    engine = VllmEngine(configuration["model"], configuration["arguments"], lambda _: None)
    events: list[int] = []
    tasks: dict[int, asyncio.Task[Any]] = {}
    if configuration.get("events"):
        engine.kv_events(lambda _, found: events.extend(h for e in found for h in getattr(e, "hashes", ())))

    def begin(question: Mapping[str, Any]) -> Coroutine[Any, Any, dict[str, Any]]:
        """Start the work before returning its coroutine, so that an early cancellation still reaches the engine."""
        if question["what"] != "generate":
            return kinds[question["what"]](question)
        sampling = Sampling(max_tokens=question["max_tokens"], temperature=0.0, ignore_eos=True, logprobs=0)
        return generate(engine.generate(GenerateRequest(question["tokens"], sampling, kv_transfer=question["kv"])))

    async def generate(stream: Stream[Delta]) -> dict[str, Any]:
        async with aclosing(stream):
            deltas = [delta async for delta in stream]
        return {
            "tokens": [token for delta in deltas for token in delta.token_ids],
            "logprobs": [entry.logprob for delta in deltas for entry in delta.logprobs or []],
            "cached": deltas[0].cached_tokens,
        }

    async def prefill(question: Mapping[str, Any]) -> dict[str, Any]:
        found = await engine.prefill(GenerateRequest(question["tokens"], Sampling()))
        decoded: dict[str, Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(found))  # as it is sent to a worker
        return decoded

    async def state(_: Mapping[str, Any]) -> dict[str, Any]:
        stats = engine.stats()[0]._asdict()
        return {
            "stats": stats,
            "transferred": engine._recorder.transferred,
            "tasks": len(engine._requests),
            "events": len(events),
        }

    async def reset(_: Mapping[str, Any]) -> bool:
        return bool(await engine._llm.reset_prefix_cache())

    kinds = {"prefill": prefill, "state": state, "reset": reset}

    def answer(number: int, task: asyncio.Task[Any]) -> None:
        del tasks[number]
        if task.cancelled():
            reply = {"error": "cancelled"}
        elif error := task.exception():
            reply = {"error": f"{type(error).__name__}: {error}"}
        else:
            reply = {"result": task.result()}
        writer.write(json.dumps({"number": number, **reply}).encode() + b"\n")

    try:
        info = await engine.start()
    except Exception as error:
        writer.write(json.dumps({"error": str(error)}).encode() + b"\n")
        await writer.drain()
        return
    writer.write(json.dumps({"pid": os.getpid(), "core": child_pids()[-1], "info": list(info)}).encode() + b"\n")
    while line := await reader.readline():
        question = json.loads(line)
        number = question["number"]
        if question["what"] != "cancel":
            tasks[number] = asyncio.create_task(begin(question))
            tasks[number].add_done_callback(functools.partial(answer, number))
        elif number in tasks:
            tasks[number].cancel()
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1]), int(sys.argv[2])))

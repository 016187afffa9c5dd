"""vLLM engines in processes of their own, for tests and benchmarks that need several: `Engines` starts them.

Run as a script, it is those processes: it imports vLLM once and forks an engine for each configuration in its arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
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

ROOT = Path(__file__).parents[2]
LINE_BYTES = 1 << 24


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
    """Engine processes by name, as a context manager. A configuration has `model`, `arguments` and `environment`."""

    def __init__(self, configurations: Mapping[str, Mapping[str, Any]]) -> None:
        self._configurations = configurations
        self.by_name: dict[str, EngineProcess] = {}

    async def __aenter__(self) -> dict[str, EngineProcess]:
        pairs = {name: socket.socketpair() for name in self._configurations}
        arguments = [json.dumps({**c, "fd": pairs[n][1].fileno()}) for n, c in self._configurations.items()]
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.vllm.engine_process", *arguments),
            pass_fds=[theirs.fileno() for _, theirs in pairs.values()],
            cwd=ROOT,
        )
        for name, (ours, theirs) in pairs.items():
            theirs.close()
            self.by_name[name] = EngineProcess(*await asyncio.open_connection(sock=ours, limit=LINE_BYTES))
        await asyncio.gather(*(engine.started() for engine in self.by_name.values()))
        return self.by_name

    async def __aexit__(self, *_: object) -> None:
        for engine in self.by_name.values():
            engine.close()
        await self._process.wait()


async def serve(configuration: Mapping[str, Any]) -> None:
    from dynamo.engines.vllm.engine import VllmEngine
    from dynamo.engines.vllm.process import child_pids

    connection = socket.socket(fileno=configuration["fd"])
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


def main() -> None:
    from dynamo.engines.vllm.options import CPU_ENVIRONMENT, ENVIRONMENT

    configurations = [json.loads(argument) for argument in sys.argv[1:]]
    if len(configurations) > 1:  # on the CPU only: it must not be forked after CUDA is initialized
        for name, value in {**ENVIRONMENT, **CPU_ENVIRONMENT}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        for module in ("vllm.v1.engine.async_llm", "vllm.v1.worker.cpu_worker", "vllm.v1.engine.core"):
            importlib.import_module(module)
    children = []
    for configuration in configurations:
        child = os.fork() if len(configurations) > 1 else 0
        if child == 0:
            for other in configurations:
                if other is not configuration:
                    os.close(other["fd"])
            os.environ.update(configuration.get("environment", {}))
            asyncio.run(serve(configuration))
            os._exit(0)
        children.append(child)
    for configuration in configurations:
        os.close(configuration["fd"])
    for child in children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()

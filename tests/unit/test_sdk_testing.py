"""Doubles for dependencies, and graphs in memory and as processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from dynamo.errors import (
    BadCallError,
    ConfigError,
    EndpointMissingError,
    GraphError,
    NoInstancesError,
    UnavailableError,
    WorkerLostError,
)
from dynamo.sdk import (
    Service,
    Topic,
    api,
    async_on_start,
    avoiding,
    bind,
    depends,
    direct,
    endpoint,
    in_flight,
    instance_ids,
    least_loaded,
    on_shutdown,
    power_of_two,
    random,
    service,
    service_context,
)
from dynamo.sdk.testing import InstanceCall, TestGraph, calls, double, lose, pool


class Word(msgspec.Struct):
    text: str


@service
class Worker(Service):
    words = Topic(Word)

    def __init__(self, mark: str = "!") -> None:
        self.mark = mark
        self.hold = asyncio.Event()

    @endpoint
    async def speak(self, word: Word) -> AsyncIterator[str]:
        for letter in word.text:
            yield letter + self.mark

    @endpoint
    async def number(self) -> int:
        context = service_context()
        return context.worker_id if context is not None else 0

    @endpoint
    async def wait(self, word: Word) -> AsyncIterator[str]:
        yield word.text
        await self.hold.wait()

    @endpoint
    async def announce(self, word: Word) -> None:
        await self.words.publish(word)

    def helper(self) -> None: ...


@service
class Entry(Service):
    worker = depends(Worker)

    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting

    @endpoint
    async def run(self) -> str:
        return "".join([item async for item in self.worker.speak(Word(self.greeting))])

    @endpoint
    async def everyone(self) -> list[int]:
        return sorted([await direct(self.worker, number).number() for number in instance_ids(self.worker)])

    @api
    async def shout(self, text: str) -> str:
        return "".join([item async for item in self.worker.speak(Word(text))])


Entry.link(Worker)


# -- pools


async def test_a_pool_behind_a_dependency() -> None:
    entry = Entry()
    workers = Worker("!"), Worker("?")
    bind(entry, worker=pool(*workers))
    assert instance_ids(entry.worker) == [1, 2]
    assert [await entry.run(), await entry.run()] == ["h!e!l!l!o!", "h?e?l?l?o?"]
    assert [item async for item in direct(entry.worker, 2).speak(Word("a"))] == ["a?"]
    assert [item async for item in avoiding(entry.worker, [1]).speak(Word("a"))] == ["a?"]
    assert [item async for item in avoiding(entry.worker, [1, 2]).speak(Word("a"))] != []
    assert calls(entry.worker)[:2] == [InstanceCall("speak", Word("hello"), 1), InstanceCall("speak", Word("hello"), 2)]
    with pytest.raises(NoInstancesError, match="instance 9 of dynamo/Worker/number is not available"):
        await direct(entry.worker, 9).number()


@pytest.mark.parametrize("choose", [least_loaded, power_of_two])
async def test_calls_in_flight_count(choose: Any) -> None:
    client = pool(Worker(), Worker())
    waiting = direct(client, 1).wait(Word("x"))
    assert await anext(waiting) == "x"
    assert in_flight(client) == {1: 1, 2: 0}
    for _ in range(3):
        assert await choose(client).number() == 0
    assert [call.instance_id for call in calls(client)[1:]] == [2, 2, 2]
    await waiting.aclose()
    await asyncio.sleep(0)
    assert in_flight(client) == {1: 0, 2: 0}
    assert await random(client).number() == 0


async def test_a_lost_instance_ends_its_calls() -> None:
    client = pool(Worker(), Worker())
    waiting = direct(client, 1).wait(Word("x"))
    assert await anext(waiting) == "x"
    lose(client, 1)
    with pytest.raises(WorkerLostError):
        await anext(waiting)
    assert instance_ids(client) == [2]
    lose(client, 2)
    with pytest.raises(NoInstancesError, match="no instance of dynamo/Worker/number is available"):
        await client.number()


async def test_requests_are_checked_as_between_processes() -> None:
    client: Any = pool(Worker())
    with pytest.raises(BadCallError, match=r"Worker\.speak: invalid request: .*Expected `str`, got `int`"):
        await anext(client.speak(Word(3)))  # type: ignore[arg-type]
    with pytest.raises(EndpointMissingError, match="Worker has no endpoint 'helper'"):
        client.helper()
    with pytest.raises(BadCallError, match=r"invalid response of Worker:1: .*Expected `int`, got `str`"):
        await double(Worker, number="five").number()


async def test_topics_reach_subscribers_of_a_pool() -> None:
    one, two = Worker(), Worker()
    client = pool(one, two)
    received: list[Word] = []
    await client.words.subscribe(received.append)
    await one.words.publish(Word("a"))
    await direct(client, 2).announce(Word("b"))
    assert received == [Word("a"), Word("b")]


async def test_pools_of_fakes() -> None:
    class Fake:
        async def number(self) -> int:
            return 7

    assert await pool(Fake(), of=Worker).number() == 7  # type: ignore[attr-defined]
    with pytest.raises(GraphError, match="Fake is not a service"):
        pool(Fake())
    with pytest.raises(GraphError, match="expected at least one instance"):
        pool()
    with pytest.raises(GraphError, match="expected a pool or a double"):
        calls(Fake())


# -- doubles


async def test_a_double_answers_as_given() -> None:
    async def speak(word: Word) -> AsyncIterator[str]:
        yield word.text.upper()

    for given, expected in ((["a", "b"], ["a", "b"]), (lambda word: [word.text], ["x"]), (speak, ["X"])):
        entry = Entry()
        bind(entry, worker=double(Worker, speak=given))
        assert [item async for item in entry.worker.speak(Word("x"))] == expected
        assert calls(entry.worker) == [InstanceCall("speak", Word("x"), 1)]
    assert await double(Worker, number=5).number() == 5
    assert await double(Worker, number=lambda: 6).number() == 6


async def test_a_double_raises_as_given() -> None:
    with pytest.raises(ValueError, match="broken"):
        await double(Worker, number=ValueError("broken")).number()
    with pytest.raises(AssertionError, match="the double of Worker was called at number, which it was not given"):
        await double(Worker, speak=[]).number()
    with pytest.raises(
        GraphError, match="double: Worker has no endpoint 'helper'; it has speak, number, wait, announce"
    ):
        double(Worker, helper=1)


# -- graphs

SETTINGS = {"Worker": {"mark": "?", "ServiceArgs": {"workers": 2}}, "Entry": {"greeting": "ab"}}


async def test_a_graph_in_memory() -> None:
    await check_graph(real=False)


async def check_graph(*, real: bool) -> None:
    """Check what holds in memory and as processes; tests/graph/test_sdk_testing.py has the processes."""
    async with TestGraph(Entry, SETTINGS, real=real) as graph:
        assert await graph.client(Entry).run() == "a?b?"
        assert await graph.client(Entry).everyone() == [1, 2]
        async with graph.http() as http:
            answer = await http.post("/shout", json={"text": "xy"})
            assert (answer.status_code, answer.json()) == (200, "x?y?")
        worker = graph.client(Worker)
        number = instance_ids(worker)[0]
        waiting = direct(worker, number).wait(Word("x"))
        assert await anext(waiting) == "x"
        await graph.kill(Worker, await direct(worker, number).number())
        with pytest.raises(WorkerLostError):
            await anext(waiting)
        assert await graph.client(Entry).run() == "a?b?"


async def test_what_a_graph_in_memory_shows() -> None:
    async with TestGraph("tests.unit.test_sdk_testing:Entry") as graph:
        (entry,) = graph.instances(Entry)
        assert entry.greeting == "hello"
        assert service_context() is None
    with pytest.raises(ConfigError, match="Wroker: no such service in the graph"):
        TestGraph(Entry, {"Wroker": {}})


def test_settings_are_checked_as_in_a_file() -> None:
    with pytest.raises(ConfigError, match=r"config:2 Worker.marc: no such setting\nhint: did you mean mark\?"):
        TestGraph(Entry, {"Worker": {"marc": "x"}})


@service
class Failing(Service):
    def __init__(self) -> None:
        raise RuntimeError("no luck")


async def test_a_service_that_fails_to_start() -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        async with TestGraph(Failing):
            pass


async def test_a_call_cancelled_before_it_runs_is_not_in_flight() -> None:
    client = pool(Worker())
    client.speak(Word("ab")).cancel()  # type: ignore[attr-defined]
    await asyncio.sleep(0.01)
    assert in_flight(client) == {1: 0}


@service
class Waiting(Service):
    def __init__(self) -> None:
        self.log: list[str] = []

    @endpoint
    async def wait(self) -> AsyncIterator[str]:
        try:
            yield "started"
            await asyncio.sleep(60)
        finally:
            self.log.append("call ended")

    @endpoint
    async def cancelled(self) -> str:
        raise asyncio.CancelledError  # as from awaiting a call that was cancelled

    @on_shutdown
    async def stop(self) -> None:
        self.log.append("stopped")


async def test_a_lost_instance_stops_computing() -> None:
    waiting = Waiting()
    client = pool(waiting)
    stream = client.wait()
    assert await anext(stream) == "started"
    lose(client, 1)
    with pytest.raises(WorkerLostError):
        await anext(stream)
    await asyncio.sleep(0.01)
    assert waiting.log == ["call ended"]
    with pytest.raises(GraphError, match=r"Waiting has no instance 1; it has none"):
        lose(client, 1)


async def test_an_endpoint_that_is_cancelled_ends_the_call() -> None:
    async with asyncio.timeout(1):
        with pytest.raises(UnavailableError, match="the call was cancelled"):
            await pool(Waiting()).cancelled()


async def test_calls_end_before_the_shutdown_hooks_run() -> None:
    async with TestGraph(Waiting) as graph:
        (waiting,) = graph.instances(Waiting)
        stream = graph.client(Waiting).wait()
        assert await anext(stream) == "started"
    assert waiting.log == ["call ended", "stopped"]
    with pytest.raises(UnavailableError):
        await anext(stream)


@service
class Numbered(Service):
    """Its first worker must not be called."""

    @async_on_start
    async def start(self) -> None:
        context = service_context()
        assert context is not None
        await context.runtime.publish(f"numbers/{context.worker_id}", context.worker_id)
        if context.worker_id == 1:
            context.headless = "follower"

    @endpoint
    async def number(self) -> int:
        context = service_context()
        return 0 if context is None else context.worker_id

    @api(http_method="GET")
    async def who(self) -> str:
        context = service_context()
        return "" if context is None else context.service_name


async def test_workers_of_a_graph_in_memory_keep_their_numbers() -> None:
    async with TestGraph(Numbered, {"Numbered": {"ServiceArgs": {"workers": 3}}}) as graph:
        client = graph.client(Numbered)
        assert instance_ids(client) == [2, 3]
        assert await direct(client, 3).number() == 3
        await graph.kill(Numbered, 2)
        assert instance_ids(client) == [3]
        with pytest.raises(GraphError, match="Numbered has no instance 2; it has 3"):
            await graph.kill(Numbered, 2)


async def test_http_in_memory_runs_as_the_service() -> None:
    async with TestGraph(Numbered, {"Numbered": {"ServiceArgs": {"workers": 2}}}) as graph, graph.http() as http:
        assert (await http.get("/who")).json() == "Numbered"

"""Channels of plain objects: what a test or a debugger has, without a graph and without NATS."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from dynamo.errors import GraphError, OverloadedError
from dynamo.sdk import (
    AbstractService,
    Service,
    Topic,
    WorkQueue,
    abstract_endpoint,
    bind,
    depends,
    endpoint,
    service,
)
from dynamo.sdk.channels import OpenQueue, OpenTopic, channels
from dynamo.sdk.depends import Stub
from dynamo.sdk.in_memory_broker import InMemoryBroker
from dynamo.sdk.spec import spec_of


class Event(msgspec.Struct):
    number: int
    tags: list[str] = []


class Model(BaseModel):
    text: str


class Base(Service):
    events = Topic(Event)


@service
class Worker(Base):
    plain = Topic(dict[str, int], name="plain-data")
    models = Topic(Model)
    tasks = WorkQueue(Event, max_tasks=4, max_tries=2)

    @endpoint
    async def run(self, request: int) -> int:
        return request


@service
class Router(Service):
    worker = depends(Worker)


async def test_a_plain_object_behind_a_dependency() -> None:
    worker, router, seen = Worker(), Router(), list[Event]()
    bind(router, worker=worker)
    assert router.worker.events is worker.events
    subscription = await router.worker.events.subscribe(seen.append)
    await worker.events.publish(Event(1, ["a"]))
    assert seen == [Event(1, ["a"])]
    await subscription.close()
    await subscription.close()
    await worker.events.publish(Event(2))
    assert len(seen) == 1


async def test_objects_and_topics_are_apart() -> None:
    one, two, seen = Worker(), Worker(), list[Any]()
    await one.events.subscribe(seen.append)
    await one.models.subscribe(seen.append)
    await two.events.publish(Event(1))
    await one.plain.publish({"a": 1})
    assert seen == []
    await one.models.publish(Model(text="x"))
    assert seen == [Model(text="x")]


@given(number=st.integers(-(2**63), 2**63 - 1), tags=st.lists(st.text()), count=st.integers(0, 5))
async def test_every_subscriber_gets_an_equal_message_of_its_own(number: int, tags: list[str], count: int) -> None:
    worker, seen = Worker(), list[Event]()
    for _ in range(count):
        await worker.events.subscribe(seen.append)
    message = Event(number, tags)
    await worker.events.publish(message)
    assert seen == [message] * count
    assert len({id(event) for event in [message, *seen]}) == count + 1


async def test_a_failing_subscriber_does_not_stop_others(caplog: pytest.LogCaptureFixture) -> None:
    worker, seen = Worker(), list[Event]()

    def fail(event: Event) -> None:
        raise KeyError("broken handler")

    await worker.events.subscribe(fail)
    await worker.events.subscribe(seen.append)
    await worker.events.publish(Event(1))
    await worker.events.publish(Event(2))
    assert [event.number for event in seen] == [1, 2]
    assert caplog.text.count("KeyError: 'broken handler'") == 2


async def test_a_handler_may_subscribe_and_publish() -> None:
    worker, seen = Worker(), list[Event]()
    await worker.plain.subscribe(lambda data: seen.append(Event(data["a"])))
    await worker.plain.publish({"a": 1})
    with pytest.raises(TypeError, match="cannot send a object"):
        await worker.plain.publish({"a": object()})  # type: ignore[dict-item]
    assert seen == [Event(1)]


def test_declarations() -> None:
    assert isinstance(Worker.events, Topic)
    assert repr(Worker.events) == "Topic(Event)"
    assert isinstance(Worker().events, OpenTopic)
    assert repr(Worker().plain) == "<topic plain-data>"
    assert isinstance(Worker.tasks, WorkQueue)
    assert repr(Worker.tasks) == "WorkQueue(Event)"
    assert list(spec_of(Worker).channels) == ["events", "plain", "models", "tasks"]

    class Without(Worker):
        plain = None  # type: ignore[assignment]

    assert list(channels(Without)) == ["events", "models", "tasks"]


def test_an_interface_may_have_channels() -> None:
    class Telling(AbstractService):
        events = Topic(Event)

        @abstract_endpoint
        async def run(self, request: int) -> int: ...

    @service
    class Notified(Telling):
        @endpoint
        async def run(self, request: int) -> int:
            return request

    assert list(spec_of(Notified).channels) == ["events"]


def test_wrong_declarations() -> None:
    for name in ("a b", "a/b", "a.b", "", ">"):
        with pytest.raises(GraphError, match=r"Topic name .*: letters, digits, '_' and '-' only"):
            Topic(Event, name=name)
    with pytest.raises(GraphError, match="WorkQueue max_tries: expected more than 0, found 0"):
        WorkQueue(Event, max_tries=0)
    with pytest.raises(GraphError, match=r"Twice.other: events already has the name 'events'"):

        @service
        class Twice(Base):
            other = Topic(Event, name="events")


def test_behind_a_remote_stub() -> None:
    class Pool:
        broker = InMemoryBroker()

    remote: Any = Stub(spec_of(Worker), Pool())  # type: ignore[arg-type]
    assert isinstance(remote.events, OpenTopic)
    assert isinstance(remote.tasks, OpenQueue)
    with pytest.raises(AttributeError, match="Worker has no endpoint 'nothing'; endpoints: run"):
        _ = remote.nothing


async def test_a_queue_of_a_plain_object() -> None:
    worker, router = Worker(), Router()
    bind(router, worker=worker)
    for number in range(4):
        await router.worker.tasks.put(Event(number))
    with pytest.raises(OverloadedError, match="the work queue tasks is full: 4 tasks"):
        await router.worker.tasks.put(Event(4))
    async with aclosing(worker.tasks.take(limit=2)) as jobs:
        held = [await anext(jobs), await anext(jobs)]
        assert [(job.task, job.tries) for job in held] == [(Event(0), 1), (Event(1), 1)]
        assert await router.worker.tasks.size() == 4
        third = asyncio.ensure_future(anext(jobs))
        await asyncio.sleep(0.01)
        assert not third.done()  # over the limit
        await held[0].done()
        await held[0].done()
        assert (await third).task == Event(2)
        assert await router.worker.tasks.size() == 3
    with pytest.raises(ValueError, match="limit: expected at least 1, found 0"):
        await anext(worker.tasks.take(limit=0))


@given(fails=st.lists(st.integers(0, 3), max_size=4), limit=st.integers(1, 5), workers=st.integers(1, 3))
async def test_every_task_ends_once(fails: list[int], limit: int, workers: int) -> None:
    """Task i fails fails[i] times; at the second time it is dropped."""
    worker, finished, tried = Worker(), list[int](), list[int]()

    async def work() -> None:
        async for job in worker.tasks.take(limit):
            tried.append(job.task.number)
            assert tried.count(job.task.number) == job.tries
            await asyncio.sleep(0)
            if job.tries <= fails[job.task.number]:
                await job.fail()
            else:
                await job.done()
                finished.append(job.task.number)

    working = [asyncio.ensure_future(work()) for _ in range(workers)]
    for number in range(len(fails)):
        await worker.tasks.put(Event(number))
    async with asyncio.timeout(10):
        while await worker.tasks.size():
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in working:
        task.cancel()
    assert all(
        isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*working, return_exceptions=True)
    )
    assert sorted(finished) == [number for number, count in enumerate(fails) if count < 2]
    assert sorted(tried) == sorted(number for number, count in enumerate(fails) for _ in range(min(count + 1, 2)))


async def test_a_job_as_a_context() -> None:
    worker = Worker()
    await worker.tasks.put(Event(1))
    jobs = worker.tasks.take()
    for tries in (1, 2):
        job = await anext(jobs)
        assert repr(job) == f"<job {Event(1)!r}, try {tries}>"
        with pytest.raises(KeyError):
            async with job:
                raise KeyError
    assert await worker.tasks.size() == 0
    await worker.tasks.put(Event(2))
    async with await anext(jobs) as job:
        assert await worker.tasks.size() == 1
    assert await worker.tasks.size() == 0


async def test_a_task_that_does_not_fit_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    await worker.tasks.put("text")  # type: ignore[arg-type]
    await worker.tasks.put(Event(2))
    assert (await anext(worker.tasks.take())).task == Event(2)
    assert "dropped a task on tasks: invalid Event" in caplog.text

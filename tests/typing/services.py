"""A graph that both type checkers must accept, with what they must infer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import assert_type

from dynamo.sdk import (
    AbstractService,
    Job,
    Reply,
    Service,
    Stream,
    Topic,
    WorkQueue,
    abstract_endpoint,
    api,
    async_on_start,
    bind,
    depends,
    direct,
    endpoint,
    in_flight,
    instance_ids,
    least_loaded,
    liveness,
    on_shutdown,
    power_of_two,
    random,
    readiness,
    round_robin,
    service,
)
from dynamo.sdk.broker import Subscription
from dynamo.sdk.channels import OpenQueue, OpenTopic


@dataclass
class Ask:
    text: str


@dataclass
class Token:
    id: int


@service(dynamo={"namespace": "typed"}, resources={"gpu": 1}, workers=2)
class Worker(Service):
    def __init__(self, model: str = "") -> None:
        self.model = model

    tokens = Topic(Token)
    texts = Topic(dict[str, int], name="texts-of-all")
    tasks = WorkQueue(Ask, max_tasks=10)

    async def inform(self) -> None:
        assert_type(self.tokens, OpenTopic[Token])
        await self.tokens.publish(Token(1))
        await self.texts.publish({"a": 1})
        async for job in self.tasks.take(limit=2):
            assert_type(job, Job[Ask])
            async with job:
                assert_type(job.task, Ask)

    @endpoint
    async def generate(self, request: Ask) -> AsyncIterator[Token]:
        yield Token(1)

    @endpoint(name="count/tokens")
    async def count(self, request: Ask) -> int:
        return len(request.text)

    @endpoint()
    def piped(self, request: Ask) -> Stream[Token]:
        return Stream.opening(self._later())

    async def _later(self) -> Stream[Token]:
        raise NotImplementedError

    @async_on_start
    async def start(self) -> None: ...

    @on_shutdown()
    def stop(self) -> None: ...


@service
class Processor(Service):
    worker = depends(Worker)

    @async_on_start
    async def listen(self) -> None:
        subscription = await self.worker.tokens.subscribe(self.on_event)
        assert_type(subscription, Subscription)
        await self.worker.tasks.put(Ask(""))
        assert_type(await self.worker.tasks.size(), int)
        await subscription.close()

    def on_event(self, token: Token) -> None: ...

    @endpoint
    async def chat(self, request: Ask) -> AsyncIterator[str]:
        assert_type(self.worker, Worker)
        async for token in self.worker.generate(request):
            assert_type(token, Token)
            yield str(token.id)
        assert_type(await self.worker.count(request), int)
        assert_type(direct(self.worker, instance_ids(self.worker)[0]), Worker)
        assert_type(await random(self.worker).count(request=request), int)
        assert_type(await least_loaded(self.worker).count(request), int)
        assert_type(power_of_two(self.worker), Worker)
        assert_type(in_flight(self.worker), dict[int, int])
        async for token in round_robin(self.worker).piped(request):
            assert_type(token, Token)
        stream = self.worker.piped(request)
        assert_type(await stream, Stream[Token])
        assert_type(stream.map(lambda token: token.id), Stream[int])


class Counts(AbstractService):
    """An interface: its bodies are never run, so that type checkers ask for none."""

    @abstract_endpoint
    async def count(self, request: Ask) -> int: ...

    @abstract_endpoint
    def generate(self, request: Ask) -> AsyncIterator[Token]: ...


@service
class Counter(Counts):
    @endpoint
    async def count(self, request: Ask) -> int:
        return 1

    @endpoint
    async def generate(self, request: Ask) -> AsyncIterator[Token]:
        yield Token(1)


@service(app=None, system_app=None)
class Frontend(Service):
    processor = depends(Processor)
    worker = depends(Worker)
    counts = depends(Counts)

    @endpoint
    def passed_on(self, request: Ask) -> Reply[int]:
        raise NotImplementedError

    @api
    async def generate(self, request: Ask) -> AsyncIterator[Token]:
        assert_type(self.counts, Counts)
        assert_type(await self.counts.count(request), int)
        async for token in self.counts.generate(request):
            assert_type(token, Token)
            yield token

    @api(name="chat/{user}", http_method="PUT")
    def chat(self, user: str) -> str:
        return user

    @api()
    def piped(self, request: Ask) -> Stream[Token]:
        return self.worker.piped(request)

    @liveness
    def alive(self) -> bool:
        return True

    @readiness(route="/custom")
    async def ready(self) -> bool:
        return True


@service
class Caller(Service):
    frontend = depends(Frontend)

    @endpoint
    async def run(self, request: Ask) -> int:
        reply = self.frontend.passed_on(request)
        assert_type(await reply, int)
        async for number in self.frontend.passed_on(request):
            assert_type(number, int)
        return await reply


assert_type(Frontend().chat("me"), str)
assert_type(Worker.tokens, Topic[Token])
assert_type(Worker.tasks, WorkQueue[Ask])
assert_type(Worker().tasks, OpenQueue[Ask])
assert_type(Frontend.link(Counter), type[Counter])
assert_type(Frontend.link(Processor), type[Processor])
assert_type(Frontend.link(Processor).link(Worker), type[Worker])
bind(Processor(), worker=Worker(model="m"))

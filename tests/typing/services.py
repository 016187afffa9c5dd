"""A graph that both type checkers must accept, with what they must infer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import assert_type

from dynamo.sdk import (
    Service,
    Stream,
    async_on_start,
    bind,
    depends,
    direct,
    endpoint,
    instance_ids,
    on_shutdown,
    random,
    round_robin,
    service,
)


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

    @endpoint
    async def chat(self, request: Ask) -> AsyncIterator[str]:
        assert_type(self.worker, Worker)
        async for token in self.worker.generate(request):
            assert_type(token, Token)
            yield str(token.id)
        assert_type(await self.worker.count(request), int)
        assert_type(direct(self.worker, instance_ids(self.worker)[0]), Worker)
        assert_type(await random(self.worker).count(request=request), int)
        async for token in round_robin(self.worker).piped(request):
            assert_type(token, Token)
        stream = self.worker.piped(request)
        assert_type(await stream, Stream[Token])
        assert_type(stream.map(lambda token: token.id), Stream[int])


@service
class Frontend(Service):
    processor = depends(Processor)
    worker = depends(Worker)


assert_type(Frontend.link(Processor), type[Processor])
assert_type(Frontend.link(Processor).link(Worker), type[Worker])
bind(Processor(), worker=Worker(model="m"))

"""Each line marked `# error` must be refused by both type checkers, and no other."""

from __future__ import annotations

from collections.abc import AsyncIterator

from dynamo.sdk import Reply, Service, Stream, Topic, api, depends, direct, endpoint, liveness, service
from tests.typing.services import Ask, Counts, Frontend, Processor, Worker


@service
class Wrong(Service):
    worker = depends(Worker)
    processor = depends(Processor)

    @endpoint
    async def chat(self, request: Ask) -> AsyncIterator[str]:
        async for token in self.worker.generate("text"):  # error: wrong request type
            yield token.text  # error: wrong item attribute
        await self.worker.generate(request)  # error: a stream typed AsyncIterator is not awaitable
        async for _ in self.worker.count(request):  # error: a result is not iterable
            pass
        number: str = await self.worker.count(request)  # error: wrong result type
        yield number
        self.worker.genrate(request)  # error: no such endpoint
        direct(self.worker, "first").count(request)  # error: an instance id is an int
        direct(self.worker, 1).count(1)  # error: wrong request type, pinned
        async for text in self.processor.chat(request):
            yield text.id  # error: wrong item attribute


async def channels(worker: Worker, processor: Processor) -> None:
    await worker.tokens.publish("text")  # error: wrong message type
    await processor.worker.tokens.subscribe(worker.tell)  # error: a handler takes the message
    await processor.worker.tokens.subscribe(Worker)  # error: a handler of another type
    Topic(Ask(""))  # error: a topic is declared with a type
    await processor.worker.tasks.put("text")  # error: wrong task type
    await processor.worker.tasks.publish(Ask(""))  # error: a queue is no topic
    async for job in worker.tasks.take():
        await job.task.done()  # error: the job is done, not the task


@service
class Halfway(Counts):
    @endpoint
    async def count(self, request: Ask) -> int:
        return 1


@service
class Otherwise(Counts):
    @endpoint
    async def count(self, request: Ask) -> str:  # error: not the interface's result
        return ""


async def replies(reply: Reply[int], stream: Stream[int]) -> str:
    text: str = await reply  # error: wrong result type
    other: int = await stream  # error: a stream gives itself
    return f"{text}{other}"


Counts()  # error: an interface cannot be made
Halfway()  # error: an endpoint is missing
Worker(modle="m")  # error: wrong keyword
Frontend.linc(Processor)  # error: no such method
Frontend.link(Processor).lnk(Worker)  # error: no such method in a chain
Frontend.link("Processor")  # error: a link takes a class
depends(Worker())  # error: depends takes a class


@service(workers="two")  # error: wrong type of workers
class Typed:
    pass


@endpoint(name=5)  # error: wrong type of name
async def run(self: object, request: Ask) -> int:
    return 1


@api(path="x")  # error: no such argument
async def post(self: object, request: Ask) -> int:
    return 1


@liveness(route=1)  # error: wrong type of route
def alive(self: object) -> bool:
    return True

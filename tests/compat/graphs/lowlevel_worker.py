"""A worker of the low-level runtime; the argument `static` makes it a static one."""

import asyncio
import sys

import uvloop
from pydantic import BaseModel

from dynamo.runtime import DistributedRuntime, dynamo_endpoint, dynamo_worker

uvloop.install()
STATIC = sys.argv[1:] == ["static"]


class Request(BaseModel):
    data: str


class Response(BaseModel):
    char: str


class RequestHandler:
    @dynamo_endpoint(Request, Response)
    async def generate(self, request):
        for char in request.data:
            if char == "!":
                raise ValueError("no shouting")
            yield char


async def echo(request):
    yield request


@dynamo_worker(static=STATIC)
async def worker(runtime: DistributedRuntime):
    component = runtime.namespace("low-level").component("backend")
    await component.create_service()
    endpoint = component.endpoint("generate")
    print("worker", endpoint.lease_id(), flush=True)
    await asyncio.gather(
        endpoint.serve_endpoint(RequestHandler().generate), component.endpoint("echo").serve_endpoint(echo)
    )
    print("worker stopped", flush=True)


asyncio.run(worker())

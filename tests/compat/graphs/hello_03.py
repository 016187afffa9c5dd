"""0.3: `endpoint()`, an own FastAPI app, StreamingResponse, `name=`, probes, sync shutdown hooks, links in the module."""

import asyncio

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from dynamo.runtime.logging import configure_dynamo_logging
from dynamo.sdk import (
    DYNAMO_IMAGE,
    api,
    async_on_start,
    depends,
    dynamo_context,
    endpoint,
    liveness,
    on_shutdown,
    readiness,
    service,
)
from dynamo.sdk.core.protocol.interface import DynamoTransport
from dynamo.sdk.lib.config import ServiceConfig

configure_dynamo_logging()
app = FastAPI(title="Hello World!")


@app.get("/custom")
async def custom():
    return {"custom": True}


class RequestType(BaseModel):
    text: str


class StartHooks:
    """A mixin: its hooks are inherited."""

    @async_on_start
    async def from_mixin(self):
        self.order = ["mixin"]


@service(dynamo={"namespace": "inference"}, resources={"cpu": 1, "memory": "500Mi"}, workers=1)
class Backend:
    @endpoint()
    async def generate(self, req: RequestType):
        for token in f"{req.text}-back".split():
            yield f"Backend: {token}"

    @api()
    async def direct_to_backend(self, req: RequestType):
        return {"backend": req.text, "url": dynamo_context["url"]}


@service(dynamo={"namespace": "inference"})
class Backend2:
    @endpoint()
    async def generate(self, req: RequestType):
        yield "never deployed"


@service(dynamo={"namespace": "inference"})
class Middle:
    backend = depends(Backend)
    backend2 = depends(Backend2)

    @endpoint()
    async def generate(self, req: RequestType):
        async for response in self.backend.generate(RequestType(text=f"{req.text}-mid").model_dump_json()):
            yield f"Middle: {response}"

    @endpoint(name="text/length")
    async def length(self, req: RequestType):
        yield len(req.text)


@service(dynamo={"namespace": "inference"}, image=DYNAMO_IMAGE, app=app)
class Frontend(StartHooks):
    backend = depends(Backend)
    middle = depends(Middle)

    def __init__(self) -> None:
        self.config = ServiceConfig.get_instance()
        self.name = "an instance's own name"
        self.alive = True

    @async_on_start
    def second(self):
        self.order.append("own")

    @liveness
    async def is_alive(self) -> bool:
        return self.alive

    @readiness
    def is_ready(self) -> bool:
        return True

    @api()
    async def generate(self, req: RequestType):
        async def content_generator():
            async for response in self.middle.generate(req.model_dump_json()):
                yield f"Frontend: {response}"

        return StreamingResponse(content_generator())

    @api(name="length")
    async def count(self, req: RequestType):
        async for length in self.middle.length(req.model_dump_json()):
            return {"length": length, "order": self.order, "port": self.config.require("Frontend", "port")}
        return None

    @endpoint(name="both", transports=[DynamoTransport.DEFAULT, DynamoTransport.HTTP])
    async def served_twice(self, req: RequestType):
        yield {"n": 1}
        yield {"n": 2}

    @api()
    async def wrong(self, req: RequestType):
        raise RuntimeError(req.text)

    @api()
    async def slow(self, req: RequestType):
        for word in req.text.split():
            yield f"{word} "
            await asyncio.sleep(0.3)

    @on_shutdown
    def stop(self):
        print("Frontend shutdown hook")


Frontend.link(Middle).link(Backend)

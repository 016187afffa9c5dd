"""A disaggregated skeleton of 0.3 without GPU: decode workers hand long prompts to prefill workers, and get the KV back."""

import asyncio

from pydantic import BaseModel

from dynamo.sdk import api, async_on_start, depends, dynamo_context, endpoint, service
from dynamo.sdk.core.protocol.interface import ComponentType
from dynamo.sdk.lib.config import ServiceConfig


class Prompt(BaseModel):
    prompt: str


class RemotePrefillRequest(BaseModel):
    engine_id: int
    prompt: str


@service(dynamo={"namespace": "dynamo-demo"}, resources={"gpu": 0})
class PrefillWorker:
    def __init__(self):
        self.background = set()

    @async_on_start
    async def async_init(self):
        runtime = dynamo_context["runtime"]
        namespace, _ = PrefillWorker.dynamo_address()
        self.kv_client = await runtime.namespace(namespace).component("DecodeWorker").endpoint("take_kv").client()

    @endpoint()
    async def prefill(self, request: RemotePrefillRequest):
        stream = await self.kv_client.direct(
            {"kv": request.prompt.upper(), "prompt": request.prompt}, request.engine_id, annotated=False
        )
        async for answer in stream:
            assert answer == "taken"
        yield "done"

    @endpoint()
    async def mock(self, request):
        yield "kept for its dependency"


@service(dynamo={"namespace": "dynamo-demo"}, resources={"gpu": 0})
class DecodeWorker:
    prefill_worker = depends(PrefillWorker)

    def __init__(self):
        config = ServiceConfig.get_parsed_config("DecodeWorker")
        self.max_local = config["max-local-prefill-length"]
        self.kv = {}
        self.arrived = asyncio.Event()

    @endpoint()
    async def take_kv(self, request: dict):
        self.kv[request["prompt"]] = request["kv"]
        yield "taken"

    @endpoint()
    async def generate(self, request: Prompt):
        engine_id = dynamo_context["endpoints"][0].lease_id()
        if len(request.prompt) > self.max_local:
            ask = RemotePrefillRequest(engine_id=engine_id, prompt=request.prompt)
            async for _ in self.prefill_worker.prefill(ask.model_dump_json()):
                pass
            yield {"where": "remote", "kv": self.kv.pop(request.prompt)}
        else:
            yield {"where": "local", "kv": request.prompt.upper()}
        yield {"where": "end", "kv": ""}


@service(dynamo={"namespace": "dynamo-demo", "component_type": ComponentType.PLANNER})
class Planner:
    @endpoint()
    async def plan(self, request: Prompt):
        yield "no-operation"


@service(dynamo={"namespace": "dynamo-demo"})
class Frontend:
    decode = depends(DecodeWorker)
    planner = depends(Planner)

    @api()
    async def generate(self, request: Prompt):
        async for item in self.decode.generate(request.model_dump_json()):
            yield item


Frontend.link(DecodeWorker).link(PrefillWorker)

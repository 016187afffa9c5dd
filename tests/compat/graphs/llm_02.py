"""An LLM graph of 0.2: Processor, Router and Worker; engine flags by `as_args`, the routed call by a runtime client."""

import argparse
import json

from pydantic import BaseModel

from dynamo.sdk import api, async_on_start, depends, dynamo_context, dynamo_endpoint, service
from dynamo.sdk.lib.config import ServiceConfig
from dynamo.sdk.lib.dependency import depends as same_depends
from dynamo.sdk.lib.service import service as same_service

assert (same_depends, same_service) == (depends, service)


class Tokens(BaseModel):
    tokens: list[int]


class GenerateRequest(BaseModel):
    request_id: str
    tokens: list[int]


class Output(BaseModel):
    text: str
    worker: str


def parse_args(service_name, prefix):
    parser = argparse.ArgumentParser()
    parser.add_argument("--router", type=str, default="random")
    parser.add_argument("--model", type=str, required=True)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=0)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--kv-transfer-config", type=json.loads, default=None)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(ServiceConfig.get_instance().as_args(service_name, prefix=prefix))


@service(
    dynamo={"enabled": True, "namespace": "dynamo"}, resources={"gpu": 0, "cpu": "10", "memory": "20Gi"}, workers=1
)
class VllmWorker:
    def __init__(self):
        self.client = None
        self.args = parse_args(self.__class__.__name__, "")
        self.worker_id = str(dynamo_context["endpoints"][0].lease_id())

    @dynamo_endpoint()
    async def generate(self, request: GenerateRequest):
        for token in request.tokens:
            yield Output(text=f"{self.args.model}:{token}", worker=self.worker_id).model_dump_json()

    @dynamo_endpoint()
    async def settings(self, request):
        yield dict(vars(self.args))


@service(dynamo={"enabled": True, "namespace": "dynamo"}, workers=1)
class Router:
    worker = depends(VllmWorker)

    def __init__(self):
        self.args = parse_args(self.__class__.__name__, "")

    @async_on_start
    async def async_init(self):
        self.runtime = dynamo_context["runtime"]
        namespace, component = VllmWorker.dynamo_address()
        self.workers_client = await self.runtime.namespace(namespace).component(component).endpoint("generate").client()
        await self.workers_client.wait_for_endpoints()

    @dynamo_endpoint()
    async def generate(self, request: Tokens):
        ids = sorted(self.workers_client.endpoint_ids())
        yield f"{ids[len(request.tokens) % len(ids)]}_0.5"


@service(dynamo={"enabled": True, "namespace": "dynamo"}, workers=1)
class Processor:
    worker = depends(VllmWorker)
    router = depends(Router)

    def __init__(self):
        self.args = parse_args("Processor", "")

    @async_on_start
    async def async_init(self):
        runtime = dynamo_context["runtime"]
        comp_ns, comp_name = VllmWorker.dynamo_address()
        self.worker_client = await runtime.namespace(comp_ns).component(comp_name).endpoint("generate").client()

    @dynamo_endpoint(name="chat/completions")
    async def chat_completions(self, raw_request: Tokens):
        request = GenerateRequest(request_id="r", tokens=raw_request.tokens).model_dump_json()
        if self.args.router == "kv":
            async for answer in self.router.generate(raw_request.model_dump_json()):
                worker_id, _ = answer.split("_")
            stream = await self.worker_client.direct(request, int(worker_id))
        elif self.args.router == "round-robin":
            stream = await self.worker_client.round_robin(request)
        else:
            stream = await self.worker_client.random(request)
        async for item in stream:
            assert not item.is_error()
            yield Output.model_validate_json(item.data()).model_dump()


@service(dynamo={"enabled": True, "namespace": "dynamo"}, workers=1)
class Frontend:
    processor = depends(Processor)
    worker = depends(VllmWorker)

    @api()
    async def chat(self, request: Tokens):
        answers = []
        async for item in self.processor.chat_completions(request.model_dump_json()):
            answers.append(item)
        return answers

    @api()
    async def settings(self):
        async for item in self.worker.settings("{}"):
            return item
        return None


Frontend.link(Processor).link(Router).link(VllmWorker)
Processor.link(VllmWorker)
Frontend.link(VllmWorker)

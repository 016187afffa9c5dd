"""0.3: a Frontend that depends on an interface, and two services that implement it."""

from pydantic import BaseModel

from dynamo.sdk import AbstractService, abstract_endpoint, api, depends, endpoint, service


class ChatRequest(BaseModel):
    text: str


class WorkerInterface(AbstractService):
    @abstract_endpoint
    async def generate(self, request: ChatRequest):
        pass


class RouterInterface(AbstractService):
    @abstract_endpoint
    async def route(self, request: ChatRequest):
        pass


@service(dynamo={"namespace": "llm-hello-world"})
class VllmWorker(WorkerInterface):
    @endpoint()
    async def generate(self, request: ChatRequest):
        yield f"vllm({request.text})"


@service(dynamo={"namespace": "llm-hello-world"})
class TrtWorker(WorkerInterface):
    @endpoint()
    async def generate(self, request: ChatRequest):
        yield f"trt({request.text})"


@service(dynamo={"namespace": "llm-hello-world"})
class FastRouter(RouterInterface):
    worker = depends(WorkerInterface)

    @endpoint()
    async def route(self, request: ChatRequest):
        async for answer in self.worker.generate(request.model_dump_json()):
            yield f"fast-{answer}"


@service(dynamo={"namespace": "llm-hello-world"})
class Frontend:
    router = depends(RouterInterface)

    @api()
    async def generate(self, request: ChatRequest):
        async for answer in self.router.route(request.model_dump_json()):
            yield answer

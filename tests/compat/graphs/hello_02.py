"""0.2: `dynamo_endpoint()`, a bare `@api` with a plain parameter, ServiceConfig read by hand, async shutdown hooks."""

import os

from pydantic import BaseModel

from dynamo.sdk import api, async_on_shutdown, async_on_start, depends, dynamo_context, dynamo_endpoint, service
from dynamo.sdk.lib.config import ServiceConfig
from dynamo.sdk.lib.image import DYNAMO_IMAGE


class RequestType(BaseModel):
    text: str


@service(
    resources={"cpu": "2"},
    traffic={"timeout": 30},
    dynamo={"enabled": True, "namespace": "inference", "custom_lease": {"ttl": 1}},
    workers=2,
    image=DYNAMO_IMAGE,
)
class Backend:
    def __init__(self) -> None:
        print("Starting backend")
        config = ServiceConfig.get_instance()
        self.message = config.get("Backend", {}).get("message", "back")

    @dynamo_endpoint()
    async def generate(self, req: RequestType):
        for token in f"{req.text}-{self.message}".split():
            yield f"Backend: {token}"

    @dynamo_endpoint()
    async def whoami(self, req: RequestType):
        endpoint = dynamo_context["endpoints"][0]
        yield {
            "pid": os.getpid(),
            "worker_id": dynamo_context["worker_id"],
            "lease": dynamo_context["lease"].id(),
            "lease_of_endpoint": endpoint.lease_id(),
            "namespace": dynamo_context["namespace"],
            "service_name": dynamo_context["service_name"],
        }


@service(resource={"cpu": "2"}, traffic={"timeout": 30}, dynamo={"enabled": True, "namespace": "inference"})
class Middle:
    backend = depends(Backend)

    def __init__(self) -> None:
        self.bias = float(ServiceConfig.get_instance().get("Middle", {}).get("bias", 0))

    @dynamo_endpoint()
    async def generate(self, req: RequestType):
        next_request = RequestType(text=f"{req.text}-mid").model_dump_json()
        async for response in self.backend.generate(next_request):
            yield f"Middle: {response}"

    @dynamo_endpoint()
    async def whoami(self, req: RequestType):
        async for response in self.backend.whoami(req.model_dump_json()):
            yield dict(response, bias=self.bias)


@service(resources={"cpu": "1"}, traffic={"timeout": 60}, dynamo={"enabled": True, "namespace": "inference"})
class Frontend:
    middle = depends(Middle)

    def __init__(self) -> None:
        config = ServiceConfig.get_instance()
        self.model = config.get("Frontend", {}).get("model", "none")
        self.started = []

    @async_on_start
    async def async_init(self):
        self.started.append("async")

    @async_on_start
    def sync_init(self):
        self.started.append("sync")

    @async_on_shutdown
    async def async_stop(self):
        print(f"Frontend hooks: {self.started} shutdown")

    @api
    async def generate(self, text):
        request = RequestType(text=self.model if text == "model" else text)
        async for response in self.middle.generate(request.model_dump_json()):
            yield f"Frontend: {response}"

    @api()
    async def whoami(self, req: RequestType):
        async for response in self.middle.whoami({"text": req.text}):
            return response
        return None

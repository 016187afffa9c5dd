"""A planner as 0.3 wrote them: its start hook is its loop, and a connector adds and removes workers."""

import asyncio

from pydantic import BaseModel

from dynamo.planner import KubernetesConnector, LocalConnector
from dynamo.planner.defaults import LoadPlannerDefaults
from dynamo.sdk import api, async_on_start, depends, dynamo_context, endpoint, service
from dynamo.sdk.core.protocol.interface import ComponentType
from dynamo.sdk.lib.config import ServiceConfig
from dynamo.sdk.lib.image import DYNAMO_IMAGE


class Ask(BaseModel):
    text: str


@service(dynamo={"namespace": "planner-03"}, workers=1)
class Echo:
    @endpoint()
    async def generate(self, request: Ask):
        yield request.text


@service(
    dynamo={"namespace": "planner-03", "component_type": ComponentType.PLANNER},
    resources={"cpu": "10", "memory": "20Gi"},
    workers=1,
    image=DYNAMO_IMAGE,
)
class Planner:
    def __init__(self):
        config = ServiceConfig.get_instance().get("Planner", {})
        self.failing = asyncio.Event()
        self.interval_s = config.get("adjustment-interval", 60)
        self.environment = config.get("environment", LoadPlannerDefaults.environment)
        if self.environment == "local":
            self.connector = LocalConnector(dynamo_context["namespace"], dynamo_context["runtime"])
        else:
            self.connector = KubernetesConnector(dynamo_context["namespace"])

    @async_on_start
    async def async_init(self):
        if self.interval_s:
            await self.failing.wait()
        raise RuntimeError("no metrics")

    @endpoint()
    async def generate(self, request: Ask):
        verb, component = request.text.split()
        if verb == "fail":
            self.failing.set()
            yield "True"
            return
        step = self.connector.add_component if verb == "add" else self.connector.remove_component
        yield str(await step(component))


@service(dynamo={"namespace": "planner-03"}, workers=1)
class Frontend:
    planner = depends(Planner)
    echo = depends(Echo)

    @api()
    async def generate(self, text: str):
        async for found in self.planner.generate(Ask(text=text).model_dump_json()):
            yield found

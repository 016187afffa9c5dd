"""0.1 and 0.2: names that their examples import, services over a Protocol, arguments that do nothing, introspection."""

import copy
import inspect
import logging
import pickle
import socket
from typing import Protocol

from dynamo.sdk import api, async_onstart, depends, dynamo_endpoint, server_context, service
from dynamo.sdk.cli.utils import reserve_free_port
from dynamo.sdk.lib.dependency import DynamoClient
from dynamo.sdk.lib.logging import configure_server_logging
from dynamo.sdk.lib.service import LeaseConfig

configure_server_logging()
logger = logging.getLogger(__name__)


class ProcessMixIn(Protocol):
    def prefix(self) -> str:
        return "mixed"


@service(
    dynamo={"enabled": True, "namespace": "names", "custom_lease": LeaseConfig(ttl=1)},
    traffic={"timeout": 30},
    dependencies=[],
    workers="2",
)
class Backend(ProcessMixIn):
    def __init__(self):
        configure_server_logging(service_name="Backend")
        with reserve_free_port() as port:
            self.port = port

    @async_onstart
    async def started(self):
        logger.info(f"hook of worker {server_context.worker_index}")

    @dynamo_endpoint("make/text")
    async def generate(self, text: str):
        yield f"{self.prefix()} {text} {server_context.worker_index} {self.port > 0}"


@service(dynamo={"enabled": True, "namespace": "names"}, traffic={"timeout": 60}, http_exposed=True)
class Frontend(ProcessMixIn):
    backend: DynamoClient = depends(Backend)

    def __init__(self):
        self.hostname = socket.gethostname()

    @api(timeout=10)
    async def generate(self, text):
        async for item in self.backend.generate(text):
            yield item

    @api
    async def introspect(self):
        found = {"vars": vars(self.backend), "dict": self.backend.__dict__}
        found["copied"] = copy.deepcopy(self.backend) is self.backend
        found["members"] = "generate" in dict(inspect.getmembers(self.backend))
        found["length"] = hasattr(self.backend, "__len__")
        try:
            pickle.dumps(self.backend)
        except TypeError as error:
            found["pickled"] = str(error)
        return found


Frontend.link(Backend)

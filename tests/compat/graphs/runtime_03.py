"""0.3: the runtime by hand in a service: etcd from the constructor and the start hook, a client of another component."""

import asyncio
import logging
import signal

from dynamo._core import Client
from dynamo.runtime import DistributedRuntime, EtcdKvCache
from dynamo.sdk import api, async_on_start, depends, dynamo_context, endpoint, service

logger = logging.getLogger(__name__)


class MetadataStore:
    def __init__(self, namespace: str, runtime: DistributedRuntime):
        self._client = runtime.etcd_client()
        if self._client is None:
            raise Exception("Cannot be used with static workers")
        self._prefix = f"{namespace}/metadata"

    async def put(self, engine_id: str, metadata: bytes):
        await self._client.kv_create_or_validate(
            f"{self._prefix}/{engine_id}", metadata, self._client.primary_lease_id()
        )

    async def get(self, engine_id: str):
        for item in await self._client.kv_get_prefix(f"{self._prefix}/{engine_id}"):
            return item["value"]
        return None


@service(dynamo={"namespace": "by-hand"})
class Worker:
    def __init__(self):
        self.runtime = dynamo_context["runtime"]
        self.store = MetadataStore("by-hand", self.runtime)
        self.lease_id = self.runtime.etcd_client().primary_lease_id()
        assert self.lease_id == dynamo_context["endpoints"][0].lease_id()

    @async_on_start
    async def async_init(self):
        await self.store.put("worker", str(self.lease_id).encode())
        loop = asyncio.get_running_loop()

        def stop():
            self.stopping = asyncio.create_task(self.graceful_shutdown())

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)

    async def graceful_shutdown(self):
        logger.info("worker shuts its runtime down")
        self.runtime.shutdown()

    @endpoint()
    async def generate(self, text: str):
        for char in text:
            yield char


@service(dynamo={"namespace": "by-hand"})
class Frontend:
    worker = depends(Worker)
    client: Client

    @async_on_start
    async def async_init(self):
        runtime = dynamo_context["runtime"]
        self.store = MetadataStore("by-hand", runtime)
        namespace, name = Worker.dynamo_address()
        self.client = await runtime.namespace(namespace).component(name).endpoint("generate").client()
        self.cache = await EtcdKvCache.create(runtime.etcd_client(), "/by-hand/frontend/", {"suffix": "!"})

    @api()
    async def generate(self, text: str) -> dict[str, str]:
        items = [item.data() async for item in await self.client.round_robin(text)]
        suffix = (await self.cache.get("suffix")).decode()
        return {"text": "".join(items) + suffix, "metadata": (await self.store.get("worker")).decode()}

    @api()
    async def set_suffix(self, text: str):
        await self.cache.put("suffix", text.encode())

    @api()
    async def workers(self) -> list[int]:
        return self.client.instance_ids()

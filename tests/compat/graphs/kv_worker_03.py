"""A worker with an engine of its own, as for 0.3: it reports its KV blocks and its load, and says what it did."""

import asyncio
import json
import sys

from dynamo.llm import ForwardPassMetrics, KvEventPublisher, KvStats, WorkerMetricsPublisher, WorkerStats
from dynamo.runtime import DistributedRuntime, dynamo_worker

BLOCK = 4


class Engine:
    def __init__(self, component, worker_id):
        self.events = KvEventPublisher(component, worker_id, BLOCK)
        self.metrics = WorkerMetricsPublisher()
        self.count = 0

    def publish(self, method, *arguments):
        self.count += 1
        method(self.count, *arguments)

    async def generate(self, request):
        """Take {"store": [hashes, tokens, parent]}, {"remove": hashes} or {"load": [running, blocks, waiting]}."""
        loop = asyncio.get_running_loop()
        if "store" in request:
            hashes, tokens, parent = request["store"]
            sizes = [BLOCK] * len(hashes)
            # from a thread, as engines do
            await loop.run_in_executor(
                None, self.publish, self.events.publish_stored, tokens, sizes, hashes, 0, parent
            )  # fmt: skip
        if "remove" in request:
            await loop.run_in_executor(None, self.publish, self.events.publish_removed, request["remove"])
        if "load" in request:
            running, blocks, waiting = request["load"]
            stats = WorkerStats(request_active_slots=running, request_total_slots=64, num_requests_waiting=waiting)
            cache = KvStats(blocks, 1000, blocks / 1000, 0.25)
            self.metrics.publish(ForwardPassMetrics(worker_stats=stats, kv_stats=cache, spec_decode_stats=None))
        yield json.dumps(request)


@dynamo_worker()
async def worker(runtime: DistributedRuntime, namespace: str):
    component = runtime.namespace(namespace).component("MyWorker")
    await component.create_service()
    endpoint = component.endpoint("generate")
    engine = Engine(component, endpoint.lease_id())
    task = asyncio.create_task(engine.metrics.create_endpoint(component))
    task.add_done_callback(lambda _: print("metrics end", flush=True))
    await endpoint.serve_endpoint(engine.generate)


asyncio.run(worker(sys.argv[1]))

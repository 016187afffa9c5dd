"""A Router and a Frontend of somebody's own over the shipped VllmWorker, as for 0.3: the worker's blocks and load decide."""

from collections.abc import AsyncIterator

from pydantic import BaseModel

from components.worker import VllmWorker
from dynamo.llm import AggregatedMetrics, KvIndexer, KvMetricsAggregator, OverlapScores, compute_block_hash_for_seq_py
from dynamo.sdk import api, async_on_start, depends, dynamo_context, endpoint, service
from dynamo.sdk.lib.config import ServiceConfig


class LocalBlockHashes(BaseModel):
    hashes: list[int]
    tokens: list[int]


class Prompt(BaseModel):
    tokens: list[int]
    worker: int | None = None


@service(dynamo={"namespace": "dynamo"})
class Router:
    worker = depends(VllmWorker)

    def __init__(self):
        self.block_size = ServiceConfig.get_parsed_config("Router")["block-size"]

    @async_on_start
    async def async_init(self):
        runtime = dynamo_context["runtime"]
        kv_listener = runtime.namespace("dynamo").component("VllmWorker")
        await kv_listener.create_service()
        self.workers_client = await kv_listener.endpoint("generate").client()
        self.indexer = KvIndexer(kv_listener, self.block_size)
        self.metrics_aggregator = KvMetricsAggregator(kv_listener)

    @endpoint()
    async def generate(self, request: LocalBlockHashes) -> AsyncIterator[dict]:
        metrics: AggregatedMetrics = await self.metrics_aggregator.get_metrics()
        by_hash: OverlapScores = await self.indexer.find_matches(request.hashes)
        by_token: OverlapScores = await self.indexer.find_matches_for_request(request.tokens, 0)
        yield {
            "workers": self.workers_client.instance_ids(),
            "scores": by_hash.scores,
            "same": by_hash.scores == by_token.scores,
            "load": {
                e.worker_id: [e.kv_active_blocks, e.kv_total_blocks, e.request_total_slots] for e in metrics.endpoints
            },
        }


@service(dynamo={"namespace": "dynamo"})
class Frontend:
    router = depends(Router)

    def __init__(self):
        self.block_size = ServiceConfig.get_parsed_config("Frontend")["block-size"]

    @async_on_start
    async def async_init(self):
        worker = dynamo_context["runtime"].namespace("dynamo").component("VllmWorker").endpoint("generate")
        self.worker_client = await worker.client()

    @api
    async def look(self, prompt: Prompt):
        hashes = compute_block_hash_for_seq_py(prompt.tokens, self.block_size)
        request = LocalBlockHashes(hashes=hashes, tokens=prompt.tokens)
        (answer,) = [answer async for answer in self.router.generate(request.model_dump_json())]
        return answer

    @api
    async def send(self, prompt: Prompt):
        request = {"token_ids": prompt.tokens, "sampling": {"max_tokens": 1}}
        return [item.data() async for item in await self.worker_client.direct(request, prompt.worker)]

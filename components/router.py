"""Router: knows what each worker's KV cache holds and what it has to do, and says where a request should go."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from components.worker import VllmWorker
from dynamo.errors import ConfigError, DynamoError, RequestError
from dynamo.kv_router.cost import PREFILL_LOAD_SCALE, Weights
from dynamo.kv_router.events import KvEvents, SnapshotRequest, WorkerLoad
from dynamo.kv_router.hashing import block_hashes, pack
from dynamo.kv_router.messages import KvMode, Route, RouteRequest, Score
from dynamo.kv_router.metrics import RouterMetrics
from dynamo.kv_router.router import KvRouter
from dynamo.sdk import (
    Service,
    async_on_start,
    depends,
    direct,
    endpoint,
    instance_ids,
    metrics_registry,
    on_shutdown,
    readiness,
    service,
    service_context,
)
from dynamo.sdk.graph import load_function

log = logging.getLogger(__name__)

FOLLOW_S = 0.05
"""How often the list of workers is looked at. Whoever calls a worker that has died hears of it at once."""
TICK_S = 1.0
SNAPSHOT_S = 10.0
RETRY_S = 1.0


class Tokens(msgspec.Struct):
    """A prompt, for `Router.generate`."""

    tokens: list[int]


@service(dynamo={"namespace": "dynamo"}, resources={"cpu": "10", "memory": "20Gi"}, workers=1)
class Router(Service):
    """Several can run: each hears all workers, and what it has placed itself until the workers report it."""

    worker = depends(VllmWorker)

    def __init__(
        self,
        model: str = "",
        min_workers: int = 1,
        block_size: int = 64,
        router: KvMode = "kv",
        overlap_score_credit: float = 1.0,
        prefill_load_scale: float = PREFILL_LOAD_SCALE,
        router_temperature: float = 0.0,
        custom_router: str | bool = False,
    ) -> None:
        """
        Args:
            model: the workers' model, for the record.
            min_workers: workers that must be there before the graph is ready.
            block_size: tokens in a KV block, until the workers have said theirs.
            router: where a request does not say: kv, by prefix and load; approx-kv, the same without KV events, by what
                was sent where; kv-load, the emptiest KV cache.
            overlap_score_credit: what a cached block of the prompt is worth, in blocks of load.
            prefill_load_scale: weight of blocks to be computed against blocks held.
            router_temperature: 0: the cheapest worker; more spreads requests over others.
            custom_router: a function `module:function` or `file.py:function` that scores a worker in place of the cost
                function; it gets the request and a `dynamo.kv_router.messages.Candidate`, the lowest score wins.
        """
        if custom_router is True:
            raise ConfigError("Router.custom-router: true", hint="name a function: custom-router: my_router.py:score")
        self.model, self.min_workers, self.block_size = model, min_workers, block_size
        score: Score | None = load_function(custom_router) if custom_router else None
        weights = Weights(prefill_load_scale, overlap_score_credit, router_temperature)
        self.kv = KvRouter(router, weights, score)
        self.metrics = RouterMetrics(self.kv, metrics_registry())
        self._fetching: dict[int, asyncio.Task[None]] = {}
        self._following: asyncio.Task[None] | None = None

    @async_on_start
    async def start(self) -> None:
        await self.worker.kv_events.subscribe(self._take_events)
        await self.worker.load.subscribe(self._take_load)
        self._following = asyncio.get_running_loop().create_task(self._follow())

    def _take_events(self, message: KvEvents) -> None:
        if self.kv.state.apply_events(message):
            self._fetch(message.worker)

    def _take_load(self, message: WorkerLoad) -> None:
        if self.kv.state.apply_load(message):
            self._fetch(message.worker)

    async def _follow(self) -> None:
        ticked = time.monotonic()
        while True:
            known, live = set(self.kv.state.workers), set(instance_ids(self.worker))
            for worker in known - live:
                self.kv.state.leave(worker)
            for worker in live - known:
                self.kv.state.join(worker)
                self._fetch(worker)
            if time.monotonic() - ticked > TICK_S:
                ticked = time.monotonic()
                self.kv.tick()
            await asyncio.sleep(FOLLOW_S)

    def _fetch(self, worker: int) -> None:
        """Get a snapshot, unless one is under way: it ends with another one where it came too early."""
        if worker not in self._fetching:
            task = asyncio.get_running_loop().create_task(self._snapshot(worker))
            self._fetching[worker] = task
            task.add_done_callback(lambda _: self._fetching.pop(worker, None))

    async def _snapshot(self, worker: int) -> None:
        again = True
        while again and worker in self.kv.state.workers:
            try:
                async with asyncio.timeout(SNAPSHOT_S):
                    parts = [part async for part in direct(self.worker, worker).kv_snapshot(SnapshotRequest())]
                again = self.kv.state.apply_snapshot(worker, parts)
            except RequestError as error:
                self.kv.state.mark_without_events(worker, error.message)
                return
            except (DynamoError, TimeoutError) as error:
                log.debug("no snapshot of worker %x, trying again: %r", worker, error)
                await asyncio.sleep(RETRY_S)
        gc.freeze()  # sets of a million hashes, which the collector would look through again and again

    @readiness
    def ready(self) -> bool:
        there = len(self.kv.state.workers)
        if there < self.min_workers and (context := service_context()) is not None:
            context.progress(f"waiting for workers: {there} of {self.min_workers}")
        return there >= self.min_workers

    @endpoint
    async def route(self, request: RouteRequest) -> Route:
        """Raises NoInstancesError when there is no worker."""
        started = time.perf_counter()
        route = self.kv.route(request)
        self.metrics.count_decision(request, route, time.perf_counter() - started)
        return route

    @endpoint
    async def generate(self, request: Tokens) -> AsyncIterator[tuple[str, float]]:
        """As in ai-dynamo 0.3: yields the worker's id and the part of the prompt that it has cached, 0 to 1."""
        size = self.kv.state.block_size or self.block_size
        hashes = pack(block_hashes(request.tokens, size))
        route = await self.route(RouteRequest("", len(request.tokens), size, hashes))
        yield str(route.worker), route.overlap_blocks * size / max(len(request.tokens), 1)

    def stats_data(self) -> dict[str, Any]:
        state = self.kv.state
        return {"workers": len(state.workers), "kv_blocks": len(state.index), "kv_resyncs": state.resyncs}

    @on_shutdown
    def stop(self) -> None:
        for task in (self._following, *self._fetching.values()):
            if task is not None:
                task.cancel()


if __name__ == "__main__":  # python -m components.router -f configs/agg_router.yaml: this service alone
    from dynamo.launcher.foreground import alone

    alone(Router)

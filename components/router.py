"""Router: follows the KV cache and the load of every worker and chooses the worker for a request."""

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
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)

POLL_S = 0.05
"""How often the list of workers is read. Calls to a worker that has died fail immediately, so nothing waits for this."""
TICK_S = 1.0
SNAPSHOT_TIMEOUT_S = 10.0
RETRY_S = 1.0


class Tokens(msgspec.Struct):
    """A prompt, for `Router.generate`."""

    tokens: list[int]


@service(dynamo={"namespace": "dynamo"}, resources={"cpu": "10", "memory": "20Gi"}, workers=1)
class Router(Service):
    """Several can run, each with the messages of all workers.

    Until a worker reports a request, only the Router that placed it counts it.
    """

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
            model: the workers' model; not used, the workers have it.
            min_workers: number of workers needed before the graph is ready.
            block_size: tokens in a KV block, until the workers have reported theirs.
            router: mode of requests that name none: kv, prefix hits against load; approx-kv, the same with prefix hits
                estimated from earlier requests, without KV events; kv-load, the emptiest KV cache.
            overlap_score_credit: value of a cached block of the prompt, in blocks of load.
            prefill_load_scale: weight of blocks to be computed against blocks held.
            router_temperature: 0: the cheapest worker; higher values spread requests over others.
            custom_router: a function `module:function` or `file.py:function` that scores a worker in place of the cost
                function; it gets the request and a `dynamo.kv_router.messages.Candidate`, the lowest score wins.
        """
        if custom_router is True:
            raise ConfigError("Router.custom-router: true", hint="name a function: custom-router: my_router.py:score")
        self.model = model
        self.min_workers = min_workers
        self.block_size = block_size
        score: Score | None = load_function(custom_router) if custom_router else None
        weights = Weights(prefill_load_scale, overlap_score_credit, router_temperature)
        self.kv_router = KvRouter(router, weights, score)
        self.state = self.kv_router.state
        self.metrics = RouterMetrics(self.kv_router, metrics_registry())
        self._tasks = TaskSet("router")
        self._fetching: set[int] = set()  # workers whose snapshot is under way

    @async_on_start
    async def start(self) -> None:
        await self.worker.kv_events.subscribe(self._apply_events)
        await self.worker.load.subscribe(self._apply_load)
        self._tasks.keep_running(self._follow_workers, name="follow workers")

    def _apply_events(self, message: KvEvents) -> None:
        if self.state.apply_events(message):
            self._start_snapshot(message.worker)

    def _apply_load(self, message: WorkerLoad) -> None:
        if self.state.apply_load(message):
            self._start_snapshot(message.worker)

    async def _follow_workers(self) -> None:
        ticked_s = time.monotonic()
        while True:
            known = set(self.state.workers)
            live = set(instance_ids(self.worker))
            for worker in known - live:
                self.state.leave(worker)
            for worker in live - known:
                self.state.join(worker)
                self._start_snapshot(worker)
            if time.monotonic() - ticked_s > TICK_S:
                ticked_s = time.monotonic()
                self.kv_router.tick()
            await asyncio.sleep(POLL_S)

    def _start_snapshot(self, worker: int) -> None:
        """Fetch a snapshot of a worker, unless one is under way: that one is repeated if it is too old."""
        if worker not in self._fetching:
            self._fetching.add(worker)
            self._tasks.spawn(self._fetch_snapshot(worker), name=f"snapshot of worker {worker:x}")

    async def _fetch_snapshot(self, worker: int) -> None:
        try:
            needed = True
            while needed and worker in self.state.workers:
                needed = await self._try_snapshot(worker)
        finally:
            self._fetching.discard(worker)

    async def _try_snapshot(self, worker: int) -> bool:
        """Fetch a snapshot and apply it; return True if another one is needed."""
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
                parts = [part async for part in direct(self.worker, worker).kv_snapshot(SnapshotRequest())]
            needed = self.state.apply_snapshot(worker, parts)
            gc.freeze()  # sets of a million hashes, which the collector would scan again and again
            return needed
        except RequestError as error:
            self.state.mark_without_events(worker, error.message)
            return False
        except (DynamoError, TimeoutError) as error:
            log.debug("no snapshot of worker %x, retrying: %r", worker, error)
            await asyncio.sleep(RETRY_S)
            return True

    @readiness
    def ready(self) -> bool:
        count = len(self.state.workers)
        if count < self.min_workers and (context := service_context()) is not None:
            context.progress(f"waiting for workers: {count} of {self.min_workers}")
        return count >= self.min_workers

    @endpoint
    async def route(self, request: RouteRequest) -> Route:
        """Choose a worker for a request. Raises NoInstancesError when there is none."""
        started_s = time.perf_counter()
        route = self.kv_router.route(request)
        self.metrics.count_decision(request, route, time.perf_counter() - started_s)
        return route

    @endpoint
    async def generate(self, request: Tokens) -> AsyncIterator[tuple[str, float]]:
        """Yield the worker's id and the part of the prompt that it has cached, 0 to 1; as in ai-dynamo 0.3."""
        size = self.state.block_size or self.block_size
        hashes = pack(block_hashes(request.tokens, size))
        route = await self.route(RouteRequest("", len(request.tokens), size, hashes))
        yield str(route.worker), route.overlap_blocks * size / max(len(request.tokens), 1)

    def stats_data(self) -> dict[str, Any]:
        state = self.state
        return {"workers": len(state.workers), "kv_blocks": len(state.index), "kv_resyncs": state.resyncs}

    @on_shutdown
    def stop(self) -> None:
        self._tasks.cancel()


if __name__ == "__main__":
    # this service alone: python -m components.router -f configs/agg_router.yaml
    from dynamo.launcher.foreground import alone

    alone(Router)

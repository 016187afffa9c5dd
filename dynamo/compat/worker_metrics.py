"""The load of workers as in ai-dynamo 0.1 to 0.3: published by a worker, collected by a router, over `$SRV.STATS`."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from dynamo.errors import TransportError
from dynamo.rpc.nats_service import service_name

if TYPE_CHECKING:
    from dynamo.runtime.component import Component

log = logging.getLogger(__name__)

ENDPOINT = "load_metrics"
SCRAPE_INTERVAL_S = 0.2
MISSED_SCRAPES = 10
"""A worker that has not answered so many times is left out."""


@dataclass
class WorkerStats:
    request_active_slots: int = 0
    request_total_slots: int = 0
    num_requests_waiting: int = 0
    data_parallel_rank: int | None = None


@dataclass
class KvStats:
    """Use of the KV cache; the last two are fractions, 0 to 1."""

    kv_active_blocks: int = 0
    kv_total_blocks: int = 0
    gpu_cache_usage_perc: float = 0.0
    gpu_prefix_cache_hit_rate: float = 0.0


@dataclass
class SpecDecodeStats:
    num_spec_tokens: int | None
    num_drafts: int | None
    num_draft_tokens: int | None
    num_accepted_tokens: int | None
    num_accepted_tokens_per_pos: list[int] | None


@dataclass
class ForwardPassMetrics:
    worker_stats: WorkerStats = field(default_factory=WorkerStats)
    kv_stats: KvStats = field(default_factory=KvStats)
    spec_decode_stats: SpecDecodeStats | None = None


@dataclass
class EndpointKvMetrics:
    """The load of one worker."""

    worker_id: int
    request_active_slots: int
    request_total_slots: int
    kv_active_blocks: int
    kv_total_blocks: int
    num_requests_waiting: int
    gpu_cache_usage_perc: float
    gpu_prefix_cache_hit_rate: float


@dataclass
class AggregatedMetrics:
    """The load of all workers; `load_avg` and `load_std` are of their active KV blocks."""

    endpoints: list[EndpointKvMetrics]
    load_avg: float
    load_std: float


class WorkerMetricsPublisher:
    """Offers a worker's load to `KvMetricsAggregator`s and to `nats micro stats`. `publish` may be called in any thread."""

    def __init__(self) -> None:
        self._metrics = ForwardPassMetrics()

    async def create_endpoint(self, component: Component, lease: object = None) -> None:
        """Serve the load as an endpoint of the component until the process stops. `lease` is ignored."""
        runtime = component.runtime
        await runtime.serve(
            component.namespace, component.name, ENDPOINT, self._generate, stats_data=lambda: asdict(self._metrics)
        )
        await runtime.stopped()

    async def _generate(self, request: Any) -> AsyncIterator[dict[str, Any]]:
        yield asdict(self._metrics)

    def publish(self, *metrics: Any, **named: Any) -> None:
        """Set the load: a `ForwardPassMetrics`, or the seven numbers and the rank of ai-dynamo 0.1 to 0.3.1."""
        given = metrics[0] if metrics else named.get("metrics")
        self._metrics = given if isinstance(given, ForwardPassMetrics) else _of_numbers(*metrics, **named)


def _of_numbers(
    request_active_slots: int,
    request_total_slots: int,
    kv_active_blocks: int,
    kv_total_blocks: int,
    num_requests_waiting: int,
    gpu_cache_usage_perc: float,
    gpu_prefix_cache_hit_rate: float,
    data_parallel_rank: int = 0,
) -> ForwardPassMetrics:
    return ForwardPassMetrics(
        WorkerStats(request_active_slots, request_total_slots, num_requests_waiting, data_parallel_rank),
        KvStats(kv_active_blocks, kv_total_blocks, gpu_cache_usage_perc, gpu_prefix_cache_hit_rate),
    )


class _Endpoint(msgspec.Struct):
    metadata: dict[str, Any] = {}
    data: dict[str, Any] = {}


class _Stats(msgspec.Struct):
    """An answer to `$SRV.STATS`."""

    id: str
    endpoints: list[_Endpoint] = []


_decode = msgspec.json.Decoder(_Stats).decode


class KvMetricsAggregator:
    """Collects the load of all workers of a component, wherever they run, until its process ends.

    Workers are those with a `WorkerMetricsPublisher`, and `VllmWorker` itself.
    """

    def __init__(self, component: Component) -> None:
        self._runtime = component.runtime
        self._service = service_name(component.namespace, component.name)
        self._metrics: dict[int, EndpointKvMetrics] = {}
        self._missed: dict[int, int] = {}  # scrapes without an answer since the last one
        self._started = asyncio.get_running_loop().create_task(self._start(), name="KvMetricsAggregator")

    async def get_metrics(self) -> AggregatedMetrics:
        """Return the load of all workers, some tenths of a second old. Raises TransportError if NATS is unreachable."""
        await asyncio.shield(self._started)
        endpoints = list(self._metrics.values())
        loads = [endpoint.kv_active_blocks for endpoint in endpoints] or [0]
        return AggregatedMetrics(endpoints, statistics.fmean(loads), statistics.pstdev(loads))

    async def _start(self) -> None:
        await self._runtime.connect()
        inbox = self._runtime.nats.new_inbox()
        await self._runtime.listen(inbox, self._on_answer)
        self._runtime.spawn(self._keep_scraping(inbox), name="KvMetricsAggregator")

    async def _keep_scraping(self, inbox: str) -> None:
        while True:
            try:
                await self._runtime.nats.publish(f"$SRV.STATS.{self._service}", b"", inbox)
            except TransportError as error:  # the last figures stay
                log.debug("load of %s not requested: %s", self._service, error.message)
            else:
                self._count_scrape()
            await asyncio.sleep(SCRAPE_INTERVAL_S)

    def _count_scrape(self) -> None:
        for worker in list(self._missed):
            self._missed[worker] += 1
            if self._missed[worker] > MISSED_SCRAPES:
                del self._missed[worker], self._metrics[worker]

    def _on_answer(self, payload: bytes) -> None:
        if not payload:  # from NATS itself: no such service
            return
        try:
            stats = _decode(payload)
            worker = int(stats.id, 16)
        except (msgspec.MsgspecError, ValueError) as error:
            log.debug("dropped an answer of %s: %s", self._service, error)
            return
        # the endpoint that is there for this, else any that has the figures
        for endpoint in sorted(stats.endpoints, key=lambda endpoint: endpoint.metadata.get("endpoint") != ENDPOINT):
            try:
                self._metrics[worker] = _metrics(worker, endpoint.data)
            except msgspec.ValidationError:
                continue
            self._missed[worker] = 0
            return


def _metrics(worker: int, data: dict[str, Any]) -> EndpointKvMetrics:
    """Read `ForwardPassMetrics` of 0.3.2, or the flat form of before and of `VllmWorker`. Raises ValidationError."""
    flat = {"worker_id": worker, **data}
    for group in ("worker_stats", "kv_stats"):
        if isinstance(data.get(group), dict):
            flat |= data[group]
    return msgspec.convert(flat, EndpointKvMetrics)

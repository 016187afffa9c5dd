"""The router's Prometheus metrics, read from its state when they are scraped."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo.kv_router.messages import Route, RouteRequest
from dynamo.kv_router.router import KvRouter

_SECONDS = (10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)
_BLOCKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_WORKER_GAUGES = {
    "prefill_blocks": "Prompt blocks that the worker still has to compute.",
    "decode_blocks": "Blocks of the requests placed on the worker.",
    "cached_blocks": "Blocks known to be in the worker's prefix cache.",
    "kv_usage": "Part of the KV cache that requests hold, 0 to 1.",
    "hit_rate": "Prompt tokens found in the prefix cache, of all, 0 to 1.",
    "blind": "1: no KV events of this cache, prompts sent there are used instead.",
}


class _Histogram:
    """A histogram in plain numbers: `observe` takes a tenth of the time of prometheus_client's."""

    def __init__(self, limits: Sequence[float]) -> None:
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._limits, value)] += 1
        self._sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        limits = [*(str(float(limit)) for limit in self._limits), "+Inf"]
        buckets = list(zip(limits, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class RouterMetrics(Collector):
    """Label `worker` is the instance id in hexadecimal, `dp_rank` its data-parallel engine."""

    def __init__(self, router: KvRouter, registry: CollectorRegistry) -> None:
        self._router = router
        self._decision = _Histogram(_SECONDS)
        self._overlap = _Histogram(_BLOCKS)
        self._requests: Counter[tuple[str, int]] = Counter()  # by mode and worker
        self._prompt_blocks = 0
        registry.register(self)

    def count_decision(self, request: RouteRequest, route: Route, seconds: float) -> None:
        self._decision.observe(seconds)
        self._overlap.observe(route.overlap_blocks)
        self._requests[request.mode or self._router.mode, route.worker] += 1
        self._prompt_blocks += max(request.prompt_tokens // request.block_size, 1)

    def collect(self) -> Iterable[Metric]:
        state = self._router.state
        yield self._decision.family("dynamo_router_decision_seconds", "Time to choose a worker.")
        yield self._overlap.family(
            "dynamo_router_overlap_blocks", "Blocks of a prompt expected in the chosen worker's prefix cache."
        )
        yield self._requests_by_worker()
        for name, documentation, value in (
            ("dynamo_router_prompt_blocks", "Blocks of the routed prompts.", self._prompt_blocks),
            ("dynamo_router_kv_event_blocks", "Blocks in the KV events received.", state.event_blocks),
            ("dynamo_router_resyncs", "Snapshots requested because events were lost.", state.resyncs),
        ):
            yield CounterMetricFamily(name, documentation, value=value)
        yield GaugeMetricFamily("dynamo_router_index_blocks", "Different blocks known.", value=len(state.index))
        yield from self._worker_gauges()

    def _requests_by_worker(self) -> Metric:
        live = set(self._router.state.workers)
        for key in [key for key in self._requests if key[1] not in live]:
            del self._requests[key]  # otherwise each restart of a worker would leave series behind
        family = CounterMetricFamily("dynamo_router_requests", "Requests routed.", labels=["mode", "worker"])
        for (mode, worker), count in self._requests.items():
            family.add_metric([mode, f"{worker:x}"], count)
        return family

    def _worker_gauges(self) -> Iterable[Metric]:
        state = self._router.state
        families = {
            name: GaugeMetricFamily(f"dynamo_router_worker_{name}", documentation, labels=["worker", "dp_rank"])
            for name, documentation in _WORKER_GAUGES.items()
        }
        for cache in state.caches:
            values: dict[str, float] = {
                "prefill_blocks": cache.prefill_blocks,
                "decode_blocks": cache.decode_blocks,
                "cached_blocks": len(state.index.blocks(cache.slot)),
                "blind": int(cache.slot in state.without_events),
            }
            load = cache.load
            if load is not None:
                values["kv_usage"] = load.kv_usage
                values["hit_rate"] = load.prefix_hits / load.prefix_queries if load.prefix_queries else 0.0
            for name, value in values.items():
                families[name].add_metric([f"{cache.worker:x}", str(cache.rank)], value)
        return families.values()

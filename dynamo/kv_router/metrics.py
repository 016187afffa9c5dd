"""The router's Prometheus metrics, read from its state when they are asked for."""

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


class _Buckets:
    """A histogram in plain numbers, a tenth of the cost of prometheus_client's object."""

    def __init__(self, limits: Sequence[float]) -> None:
        self.limits, self.counts, self.sum = limits, [0] * (len(limits) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.limits, value)] += 1
        self.sum += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        limits = [*map(str, map(float, self.limits)), "+Inf"]
        return HistogramMetricFamily(
            name, text, buckets=list(zip(limits, accumulate(self.counts), strict=True)), sum_value=self.sum
        )


class RouterMetrics(Collector):
    """Label `worker` is the instance id in hexadecimal, `dp_rank` its data-parallel engine."""

    def __init__(self, router: KvRouter, registry: CollectorRegistry) -> None:
        self._router = router
        self._decision, self._overlap = _Buckets(_SECONDS), _Buckets(_BLOCKS)
        self._requests: Counter[tuple[str, int]] = Counter()
        self._prompt_blocks = 0
        registry.register(self)

    def decided(self, request: RouteRequest, route: Route, seconds: float) -> None:
        self._decision.observe(seconds)
        self._overlap.observe(route.overlap_blocks)
        self._requests[request.mode or self._router.mode, route.worker] += 1
        self._prompt_blocks += max(request.prompt_tokens // request.block_size, 1)

    def collect(self) -> Iterable[Metric]:
        caches = self._router.caches
        yield self._decision.family("dynamo_router_decision_seconds", "Time to choose a worker.")
        yield self._overlap.family(
            "dynamo_router_overlap_blocks", "Blocks of a prompt expected in the chosen worker's prefix cache."
        )
        requests = CounterMetricFamily("dynamo_router_requests", "Requests routed.", labels=["mode", "worker"])
        live = set(caches.workers)
        for key in [key for key in self._requests if key[1] not in live]:
            del self._requests[key]  # or there would be more of them with every restart of a worker
        for (mode, worker), count in self._requests.items():
            requests.add_metric([mode, f"{worker:x}"], count)
        yield requests
        for name, text, value in (
            ("dynamo_router_prompt_blocks", "Blocks of the routed prompts.", self._prompt_blocks),
            ("dynamo_router_kv_event_blocks", "Blocks in the KV events received.", caches.events),
            ("dynamo_router_resyncs", "Snapshots asked for because events were lost.", caches.resyncs),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield GaugeMetricFamily("dynamo_router_index_blocks", "Different blocks known.", value=len(caches.index))
        yield from self._by_worker()

    def _by_worker(self) -> Iterable[Metric]:
        caches = self._router.caches
        labels = ["worker", "dp_rank"]
        families = {
            name: GaugeMetricFamily(f"dynamo_router_worker_{name}", text, labels=labels)
            for name, text in (
                ("prefill_blocks", "Prompt blocks that the worker has still to compute."),
                ("decode_blocks", "Blocks of the requests placed on the worker."),
                ("cached_blocks", "Blocks known to be in the worker's prefix cache."),
                ("kv_usage", "Part of the KV cache that requests hold, 0 to 1."),
                ("hit_rate", "Prompt tokens found in the prefix cache, of all, 0 to 1."),
                ("blind", "1: its KV events do not come, what was sent there is used instead."),
            )
        }
        for cache in caches.all():
            told, slot = cache.load, cache.slot
            values: dict[str, float] = {
                "prefill_blocks": caches.loads.prefill[slot],
                "decode_blocks": caches.loads.decode[slot],
                "cached_blocks": len(caches.index.blocks(slot)),
                "blind": caches.blind >> slot & 1,
            }
            if told is not None:
                values["kv_usage"] = told.kv_usage
                values["hit_rate"] = told.prefix_hits / told.prefix_queries if told.prefix_queries else 0.0
            for name, value in values.items():
                families[name].add_metric([f"{cache.worker:x}", str(cache.rank)], value)
        yield from families.values()

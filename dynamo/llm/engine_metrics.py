"""An engine's load for Prometheus and for `$SRV.STATS`, under ai-dynamo's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo.llm.engine import Engine, EngineInfo, EngineStats


class EngineCollector(Collector):
    """Collector that reads the engine at each scrape.

    With several data-parallel ranks there is a sample for each, with the label `dp_rank`.
    """

    def __init__(self, engine: Engine, info: EngineInfo, *, component: str, endpoint: str, worker_id: str) -> None:
        """`worker_id` is the instance id in hex."""
        self._engine = engine
        self._info = info
        self._labels = {"component": component, "endpoint": endpoint, "worker_id": worker_id}

    def collect(self) -> Iterable[Metric]:
        ranks = self._engine.stats()
        blocks = self._info.kv_blocks
        yield self._gauge("llm_kv_blocks_active", "KV blocks in use.", [_active_blocks(r, blocks) for r in ranks])
        yield self._gauge("llm_kv_blocks_total", "KV blocks.", [blocks for _ in ranks])
        yield self._gauge("llm_requests_active_slots", "Requests running in the engine.", [r.running for r in ranks])
        slots = [self._info.slots for _ in ranks]
        yield self._gauge(
            "llm_requests_total_slots", "Largest number of requests that the engine runs at a time.", slots
        )
        yield self._gauge("llm_requests_waiting", "Requests waiting in the engine.", [r.waiting for r in ranks])
        queries, hits = [r.prefix_queries for r in ranks], [r.prefix_hits for r in ranks]
        yield self._counter("llm_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", queries)
        yield self._counter("llm_prefix_cache_hits", "Prompt tokens found in the prefix cache.", hits)
        rates = [100 * hit / query if query else 0.0 for hit, query in zip(hits, queries, strict=True)]
        yield self._gauge("llm_kv_hit_rate_percent", "Percentage of prompt tokens found in the prefix cache.", rates)
        yield from self._transfers()

    def _transfers(self) -> Iterable[Metric]:
        transfers = self._engine.kv_transfers()
        if transfers is None:
            return
        for name, text, count in (
            ("kv_transfers", "Completed and failed fetches of a prompt's KV from another engine.", transfers.pulls),
            (
                "kv_transfer_failures",
                "Failed fetches of a prompt's KV; the prompt was computed here.",
                transfers.failures,
            ),
            ("kv_transfer_bytes", "Bytes of KV fetched from other engines.", transfers.bytes),
            (
                "kv_transfer_seconds",
                "Total duration of all fetches, without their wait for KV blocks.",
                transfers.seconds,
            ),
            (
                "kv_unclaimed",
                "Prompts whose KV was kept for another engine and not fetched in time.",
                transfers.expired,
            ),
        ):
            family = CounterMetricFamily(f"dynamo_disagg_{name}", text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), count)
            yield family

    def _gauge(self, name: str, text: str, values: Sequence[float]) -> Metric:
        return self._fill(GaugeMetricFamily(name, text, labels=self._names(values)), values)

    def _counter(self, name: str, text: str, values: Sequence[float]) -> Metric:
        return self._fill(CounterMetricFamily(name, text, labels=self._names(values)), values)

    def _names(self, values: Sequence[float]) -> list[str]:
        return [*self._labels, *(["dp_rank"] if len(values) > 1 else [])]

    def _fill(self, family: GaugeMetricFamily | CounterMetricFamily, values: Sequence[float]) -> Metric:
        for rank, value in enumerate(values):
            family.add_metric([*self._labels.values(), *([str(rank)] if len(values) > 1 else [])], value)
        return family


def load_metrics(engine: Engine, info: EngineInfo) -> dict[str, float]:
    """Return the load of all ranks together under the names of ai-dynamo 0.3's `load_metrics`.

    `gpu_cache_usage_perc` and `gpu_prefix_cache_hit_rate` are fractions of 0 to 1, as in ai-dynamo.
    """
    ranks = engine.stats()
    queries = sum(rank.prefix_queries for rank in ranks)
    return {
        "request_active_slots": sum(rank.running for rank in ranks),
        "request_total_slots": info.slots * len(ranks),
        "num_requests_waiting": sum(rank.waiting for rank in ranks),
        "kv_active_blocks": sum(_active_blocks(rank, info.kv_blocks) for rank in ranks),
        "kv_total_blocks": info.kv_blocks * len(ranks),
        "gpu_cache_usage_perc": sum(rank.kv_usage for rank in ranks) / max(len(ranks), 1),
        "gpu_prefix_cache_hit_rate": sum(rank.prefix_hits for rank in ranks) / queries if queries else 0.0,
    }


def _active_blocks(rank: EngineStats, blocks: int) -> int:
    return round(rank.kv_usage * blocks)

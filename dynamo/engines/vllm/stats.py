"""Statistics that vLLM's schedulers report after their steps: load, prefix hits, and KV fetched from other engines."""

from __future__ import annotations

import importlib
from typing import Any

from dynamo.llm.engine import EngineStats, KvTransfers

_IDLE = EngineStats(0, 0, 0.0, 0, 0)


class StatsRecorder:
    """Keeps the latest statistics of every data-parallel rank; vLLM writes to it through `stat_logger`."""

    def __init__(self) -> None:
        self.ranks = [_IDLE]
        """by rank, as of its latest step"""
        self.transferred: dict[str, float] = {}
        """sums since the start: those of `KvTransfers` with our connector, other numbers with another connector"""

    def set_rank_count(self, ranks: int) -> None:
        self.ranks = [_IDLE] * ranks

    def transfers(self) -> KvTransfers:
        """Return the sums that our connector reports."""
        counts = self.transferred
        return KvTransfers(
            pulls=int(counts.get("pulls", 0)),
            failures=int(counts.get("failures", 0)),
            bytes=int(counts.get("bytes", 0)),
            seconds=counts.get("seconds", 0.0),
            expired=int(counts.get("expired", 0)),
        )

    def stat_logger(self, _: Any, engine_index: int = 0) -> Any:
        """Create one of vLLM's stat loggers, which records into this object; vLLM calls this for each rank."""
        loggers = importlib.import_module("vllm.v1.metrics.loggers")
        recorder = self

        class StatLogger(loggers.StatLoggerBase):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                self.queries = 0
                self.hits = 0

            def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, *_: Any, **__: Any) -> None:
                stats = scheduler_stats
                if stats is None:
                    return
                self.queries += stats.prefix_cache_stats.queries
                self.hits += stats.prefix_cache_stats.hits
                recorder.ranks[engine_index] = EngineStats(
                    stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage, self.queries, self.hits
                )
                for name, count in (stats.kv_connector_stats or {}).items():
                    if isinstance(count, (int, float)):  # other connectors also report lists
                        recorder.transferred[name] = recorder.transferred.get(name, 0) + count

            def log_engine_initialized(self) -> None:
                return None

        return StatLogger()

"""What vLLM's schedulers tell after their steps: load and prefix hits of each rank, and KV fetched from other engines."""

from __future__ import annotations

import importlib
from typing import Any

from dynamo.llm.engine import EngineStats, KvTransfers

_IDLE = EngineStats(0, 0, 0.0, 0, 0)


class Record:
    def __init__(self) -> None:
        self.ranks = [_IDLE]
        """the last word of each data-parallel rank"""
        self.transferred: dict[str, float] = {}
        """since the start: what `KvTransfers` says with our connector, other numbers with another one"""

    def expect(self, ranks: int) -> None:
        self.ranks = [_IDLE] * ranks

    def transfers(self) -> KvTransfers:
        counts = self.transferred
        return KvTransfers(
            pulls=int(counts.get("pulls", 0)),
            failures=int(counts.get("failures", 0)),
            bytes=int(counts.get("bytes", 0)),
            seconds=counts.get("seconds", 0.0),
            expired=int(counts.get("expired", 0)),
        )

    def logger(self, _: Any, engine_index: int = 0) -> Any:
        """One of vLLM's stat loggers, which writes down here what it is told: vLLM makes one for each rank."""
        loggers = importlib.import_module("vllm.v1.metrics.loggers")
        mine = self

        class Recorder(loggers.StatLoggerBase):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                self.queries = self.hits = 0

            def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, *_: Any, **__: Any) -> None:
                found = scheduler_stats
                if found is not None:
                    self.queries += found.prefix_cache_stats.queries
                    self.hits += found.prefix_cache_stats.hits
                    mine.ranks[engine_index] = EngineStats(
                        found.num_running_reqs, found.num_waiting_reqs, found.kv_cache_usage, self.queries, self.hits
                    )
                    for name, count in (found.kv_connector_stats or {}).items():
                        if isinstance(count, (int, float)):  # another connector's may be lists
                            mine.transferred[name] = mine.transferred.get(name, 0) + count

            def log_engine_initialized(self) -> None:
                return None

        return Recorder()

"""EngineService: the common part of VllmWorker and PrefillWorker, the services that run an engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dynamo import engines
from dynamo.config.provenance import canonical
from dynamo.config.upstream_keys import Change
from dynamo.engines.kv_transfer.configuration import upstream_connector
from dynamo.engines.vllm.install import cpu_build, engine_arguments, unverifiable_flags
from dynamo.engines.vllm.multi_node import NodeGroup, integer_setting
from dynamo.engines.vllm.old_flags import changed_flag
from dynamo.llm.engine import EngineInfo
from dynamo.sdk import Service, liveness, metrics_registry, on_shutdown, service_context

log = logging.getLogger(__name__)

SIZES = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
"""vLLM's flags whose product is the number of GPUs"""


class EngineService(Service):
    """Starts, watches and stops an engine. Settings that are not parameters of the constructor are vLLM's flags."""

    extra_settings = staticmethod(engine_arguments)
    info: EngineInfo
    """set once the engine has started"""

    @staticmethod
    def gpus_needed(settings: Mapping[str, Any]) -> float:
        """Return the GPUs of one worker on this host with these settings, unless ServiceArgs says otherwise."""
        if settings.get("engine") == "mock" or cpu_build():
            return 0
        gpus = math.prod(integer_setting(settings, size, 1, 1) for size in SIZES)
        return math.ceil(gpus / integer_setting(settings, "nnodes", 1, 1))

    @staticmethod
    def check_settings(settings: Mapping[str, Any], where: Callable[[str], str]) -> None:
        """Validate those of vLLM's flags that determine how many GPUs and hosts it takes."""
        for size in SIZES:
            integer_setting(settings, size, 1, 1, where=where)
        NodeGroup.from_flags(settings, where)

    @classmethod
    def upgrade_setting(
        cls, key: str, value: Any, settings: Mapping[str, Any], services: Collection[str]
    ) -> Change | None:
        """Return what becomes of a flag that the installed vLLM has no more, or reads otherwise."""
        if canonical(key) == "kv-transfer-config":
            sizes = {canonical(name): str(size) for name, size in settings.items()}
            return upstream_connector(
                value,
                exchanges_kv=cls.exchanges_kv(settings, services),
                several_gpus=any(sizes.get(size, "1") != "1" for size in SIZES[:2]),
            )
        known = engine_arguments()
        return None if known is None else changed_flag(key, value, known)

    @classmethod
    def exchanges_kv(cls, settings: Mapping[str, Any], services: Collection[str]) -> bool:
        """Return whether these workers exchange KV with others, in a graph of these services."""
        return True

    def __init__(
        self, model: str, engine: str, speedup_ratio: float | None, engine_args: dict[str, Any], *, kv_transfer: bool
    ) -> None:
        """`kv_transfer`: the engine sends KV to other engines, or fetches it from them."""
        self.model = model
        self.engine_name = engine
        if engine == "mock" and (unknown := unverifiable_flags(engine_args)):
            log.warning("vLLM is not installed: cannot validate flag %s", " or ".join(unknown))
        if speedup_ratio is not None and engine == "mock":
            engine_args["speedup-ratio"] = speedup_ratio
        if kv_transfer:
            engine_args["kv-transfer"] = True
        self.engine = engines.create(engine, model, engine_args, self._report_progress)

    def _report_progress(self, text: str) -> None:
        context = service_context()
        if context is not None:
            context.progress(text)

    async def start_engine(self) -> bool:
        """Start the engine and set `info`.

        Returns False on a follower node of an engine that spans several hosts: this process then has no endpoints.
        """
        self.info = await self.engine.start()
        context = service_context()
        if context is not None and self.info.headless:
            context.headless = self.info.headless
        return not self.info.headless

    def export_engine_metrics(self, endpoint: str, instance_id: int) -> None:
        """Export the engine's load on /metrics, labelled with an endpoint's name and this process's instance id."""
        # imported here: a dry run needs no prometheus_client
        from dynamo.llm.engine_metrics import EngineCollector

        labels = {"component": self.dynamo_address()[1], "endpoint": endpoint, "worker_id": f"{instance_id:x}"}
        metrics_registry().register(EngineCollector(self.engine, self.info, **labels))

    def stats_data(self) -> dict[str, float]:
        """Return the engine's load for `$SRV.STATS` and `dynamo status`."""
        from dynamo.llm.engine_metrics import load_metrics

        return load_metrics(self.engine, self.info)

    @liveness
    async def healthy(self) -> bool:
        """Check the engine. Raises EngineError if it has failed."""
        await self.engine.check_health()
        return True

    @on_shutdown
    async def stop(self) -> None:
        await self.engine.stop()

"""EngineService: what the services around an engine share, which are VllmWorker and PrefillWorker."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from dynamo import engines
from dynamo.engines.vllm.install import cpu_build, engine_arguments, unverifiable_flags
from dynamo.engines.vllm.multi_node import NodeGroup, integer_setting
from dynamo.llm.engine import EngineInfo
from dynamo.sdk import Service, liveness, metrics_registry, on_shutdown, service_context

log = logging.getLogger(__name__)

SIZES = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")


class EngineService(Service):
    """Keys of the configuration that are not parameters of the constructor go to the engine, as vLLM's flags."""

    extra_settings = staticmethod(engine_arguments)
    info: EngineInfo
    """once the engine has started"""

    @staticmethod
    def gpus_needed(settings: Mapping[str, Any]) -> float:
        """GPUs of one worker on this host with these settings, unless ServiceArgs says otherwise."""
        if settings.get("engine") == "mock" or cpu_build():
            return 0
        gpus = math.prod(integer_setting(settings, size, 1, 1) for size in SIZES)
        return math.ceil(gpus / integer_setting(settings, "nnodes", 1, 1))

    @staticmethod
    def check_settings(settings: Mapping[str, Any], where: Callable[[str], str]) -> None:
        """Of vLLM's flags, those that say how many GPUs and hosts it takes."""
        for size in SIZES:
            integer_setting(settings, size, 1, 1, where=where)
        NodeGroup.from_flags(settings, where)

    def __init__(
        self, model: str, engine: str, speedup_ratio: float | None, engine_args: dict[str, Any], *, kv_transfer: bool
    ) -> None:
        """`kv_transfer`: the engine gives KV to other engines and takes it from them."""
        self.model, self.engine_name = model, engine
        if engine == "mock" and (loose := unverifiable_flags(engine_args)):
            log.warning("vLLM is not installed: nothing says whether it has a flag %s", " or ".join(loose))
        if speedup_ratio is not None and engine == "mock":
            engine_args["speedup-ratio"] = speedup_ratio
        if kv_transfer:
            engine_args["kv-transfer"] = True
        self.engine = engines.create(engine, model, engine_args, self._progress)

    def _progress(self, text: str) -> None:
        context = service_context()
        if context is not None:
            context.progress(text)

    async def start_engine(self) -> bool:
        """False where this process runs a part of another one's engine: then it has no endpoints."""
        self.info = await self.engine.start()
        context = service_context()
        if context is not None and self.info.part_of:
            context.headless = self.info.part_of
        return not self.info.part_of

    def count(self, endpoint: str, instance_id: int) -> None:
        """Export the engine's load on /metrics, labelled with an endpoint's name and this process's instance id."""
        # here, so that a dry run does not import prometheus_client
        from dynamo.llm.engine_metrics import EngineCollector

        labels = {"component": self.dynamo_address()[1], "endpoint": endpoint, "worker_id": f"{instance_id:x}"}
        metrics_registry().register(EngineCollector(self.engine, self.info, **labels))

    def stats_data(self) -> dict[str, float]:
        """For `$SRV.STATS` and `dynamo status`."""
        from dynamo.llm.engine_metrics import load_metrics

        return load_metrics(self.engine, self.info)

    @liveness
    async def healthy(self) -> bool:
        await self.engine.check_health()
        return True

    @on_shutdown
    async def stop(self) -> None:
        await self.engine.stop()

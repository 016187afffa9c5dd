"""VllmWorker: an engine, its endpoints, a model card in etcd, and what the worker tells of its KV cache and its load."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dynamo.kv.events import EngineEvent, KvEvents, KvSnapshot, SnapshotRequest, WorkerLoad
from dynamo.llm import engine as engines
from dynamo.llm.activity import Activity
from dynamo.llm.engines.installed import cpu_build, engine_arguments
from dynamo.llm.protocol import Delta, GenerateRequest, ModelCard, model_key
from dynamo.sdk import (
    Service,
    Stream,
    Topic,
    async_on_start,
    dynamo_context,
    endpoint,
    liveness,
    metrics_registry,
    on_shutdown,
    service,
)
from dynamo.wire.stream import Channel

log = logging.getLogger(__name__)


@service(dynamo={"namespace": "dynamo"}, resources={"gpu": 1, "cpu": "10", "memory": "20Gi"}, workers=1)
class VllmWorker(Service):
    """Computes tokens. Keys of the configuration that are not parameters here go to vLLM as its command-line flags."""

    kv_events = Topic(KvEvents)
    load = Topic(WorkerLoad)

    extra_settings = staticmethod(engine_arguments)

    @staticmethod
    def gpus_needed(settings: Mapping[str, Any]) -> float:
        """GPUs of one worker with these settings, unless ServiceArgs says otherwise."""
        if settings.get("engine") == "mock" or cpu_build():
            return 0
        sizes = (settings.get(f"{kind}-parallel-size", 1) for kind in ("tensor", "pipeline", "data"))
        return math.prod(int(size) for size in sizes)

    def __init__(
        self,
        model: str = "",
        engine: Literal["vllm", "mock"] = "vllm",
        router: str = "random",
        speedup_ratio: float | None = None,
        kv_events: bool | None = None,
        **engine_args: Any,
    ) -> None:
        """
        Args:
            model: a directory, a Hugging Face id, or dynamo-tiny.
            engine: vllm, or mock: deterministic tokens at a modelled pace, without a model.
            router: how requests reach this worker; the Processor decides, this is for the record.
            speedup_ratio: divides the mock engine's modelled times; 0: no waiting.
            kv_events: publish what is in the KV cache, which needs prefix caching; None: when router begins with kv.
        """
        self.model, self.router = model, router
        if speedup_ratio is not None and engine == "mock":
            engine_args["speedup-ratio"] = speedup_ratio
        named = engine_args.get("served-model-name", engine_args.get("served_model_name", model))
        self.served_name = str(named[0] if isinstance(named, list) else named)
        self.engine_name = engine
        self.tells_kv_events = router.startswith("kv") if kv_events is None else kv_events
        self.prefix_caching = engine_args.get("enable-prefix-caching", engine_args.get("enable_prefix_caching"))
        self.engine = engines.create(engine, model, engine_args, self._progress)
        self.activity: Activity | None = None  # in a graph only

    def _progress(self, text: str) -> None:
        report = dynamo_context.get("progress")
        if report is not None:
            report(text)

    @async_on_start
    async def start(self) -> None:
        runtime = dynamo_context.get("runtime")
        if runtime is None:
            await self.engine.start()
            return  # plain Python: a test, or a debugger
        tells = self.tells_kv_events and self._listen()
        self.info = info = await self.engine.start()
        self.activity = Activity(
            runtime.instance_id,
            self.engine,
            info,
            kv_events=tells,
            publish_kv=self.kv_events.publish,
            publish_load=self.load.publish,
        )
        namespace, component = self.dynamo_address()
        self._count(component, f"{runtime.instance_id:x}")
        card = ModelCard(
            name=self.served_name,
            source=self.model,
            namespace=namespace,
            component=component,
            context_length=info.context_length,
            kv_block_size=info.kv_block_size,
            engine=self.engine_name,
            created=int(time.time()),
        )
        await runtime.connect()
        await runtime.publish(model_key(card.name, runtime.instance_id), card)
        self.activity.start()

    def _count(self, component: str, worker_id: str) -> None:
        # here, so that a dry run does not import prometheus_client
        from dynamo.llm.engine_metrics import EngineCollector

        labels = {"component": component, "endpoint": "generate", "worker_id": worker_id}
        metrics_registry().register(EngineCollector(self.engine, self.info, **labels))

    def stats_data(self) -> dict[str, float]:
        """For `$SRV.STATS` and `dynamo status`."""
        from dynamo.llm.engine_metrics import load_metrics

        return load_metrics(self.engine, self.info)

    def _listen(self) -> bool:
        if self.engine.kv_events(self._take_events):
            return True
        off = self.prefix_caching is False
        log.warning(
            "no KV events, so no router knows what is cached here: %s",
            "enable-prefix-caching is false" if off else f"the {self.engine_name} engine does not tell them",
        )
        return False

    def _take_events(self, rank: int, events: Sequence[EngineEvent]) -> None:
        if self.activity is not None:
            self.activity.take_events(rank, events)

    @endpoint
    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        if self.activity is None:
            return self.engine.generate(request)
        return self.activity.generate(request)

    @endpoint
    def kv_snapshot(self, request: SnapshotRequest) -> Stream[KvSnapshot]:
        """All blocks in the KV caches, rank by rank."""
        if self.activity is not None:
            return self.activity.snapshot()
        nothing: Channel[KvSnapshot] = Channel()
        nothing.end()
        return Stream(nothing)

    @liveness
    async def healthy(self) -> bool:
        await self.engine.check_health()
        return True

    @on_shutdown
    async def stop(self) -> None:
        if self.activity is not None:
            await self.activity.stop()
        await self.engine.stop()


if __name__ == "__main__":  # python -m components.worker -f configs/agg.yaml: this service alone, under a debugger too
    from dynamo.serve.foreground import alone

    alone(VllmWorker)

"""VllmWorker: an engine, its endpoints, a model card in etcd, and what the worker tells of its KV cache and its load."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from components.engine_service import EngineService
from components.prefill_worker import PrefillWorker
from dynamo.errors import ConfigError
from dynamo.kv_router.events import EngineEvent, KvEvents, KvSnapshot, SnapshotRequest, WorkerLoad
from dynamo.llm.disagg import Rules
from dynamo.llm.protocol import Delta, GenerateRequest, ModelCard, model_key
from dynamo.llm.remote_prefill import RemotePrefill
from dynamo.llm.worker_reporter import WorkerReporter
from dynamo.sdk import (
    Stream,
    Topic,
    async_on_start,
    depends,
    direct,
    endpoint,
    instance_ids,
    is_linked,
    metrics_registry,
    on_shutdown,
    service,
    service_context,
)
from dynamo.sdk.context import ProcessRuntime
from dynamo.streams import Channel

log = logging.getLogger(__name__)


@service(dynamo={"namespace": "dynamo"}, resources={"gpu": 1, "cpu": "10", "memory": "20Gi"}, workers=1)
class VllmWorker(EngineService):
    """Computes tokens. Keys of the configuration that are not parameters here go to vLLM as its command-line flags."""

    prefill_worker = depends(PrefillWorker, optional=True)
    kv_events = Topic(KvEvents)
    load = Topic(WorkerLoad)

    live_settings = (
        "remote-prefill",
        "conditional-disagg",
        "max-local-prefill-length",
        "max-prefill-queue-size",
        "prefill-timeout-s",
    )

    def __init__(
        self,
        model: str = "",
        engine: Literal["vllm", "mock"] = "vllm",
        router: str = "random",
        speedup_ratio: float | None = None,
        kv_events: bool | None = None,
        remote_prefill: bool = False,
        conditional_disagg: bool = False,
        max_local_prefill_length: int = 1000,
        max_prefill_queue_size: int = 3,
        prefill_timeout_s: float = 20.0,
        **engine_args: Any,
    ) -> None:
        """
        Args:
            model: a directory, a Hugging Face id, or dynamo-tiny.
            engine: vllm, or mock: deterministic tokens at a modelled pace, without a model.
            router: how requests reach this worker; the Processor decides, this is for the record.
            speedup_ratio: divides the mock engine's modelled times; 0: no waiting.
            kv_events: publish what is in the KV cache, which needs prefix caching; None: when router begins with kv, or
                with remote_prefill, which asks what is cached.
            remote_prefill: let PrefillWorkers compute prompts.
            conditional_disagg: only long ones, while few wait for it; False: all.
            max_local_prefill_length: tokens not cached here up to which a prompt is not long.
            max_prefill_queue_size: tasks in the prefill queue, taken by nobody yet, from which on prompts are computed here.
            prefill_timeout_s: how long a prompt may wait for a PrefillWorker and be computed there; then it is computed here.
        """
        named = engine_args.get("served-model-name", engine_args.get("served_model_name", model))
        self.router = router
        self.served_name = str(named[0] if isinstance(named, list) else named)
        self.tells_kv_events = router.startswith("kv") or remote_prefill if kv_events is None else kv_events
        self.prefix_caching = engine_args.get("enable-prefix-caching", engine_args.get("enable_prefix_caching"))
        self.remote_prefill, self.conditional_disagg = remote_prefill, conditional_disagg
        self.max_local_prefill_length, self.max_prefill_queue_size = max_local_prefill_length, max_prefill_queue_size
        self.prefill_timeout_s = prefill_timeout_s
        super().__init__(model, engine, speedup_ratio, engine_args, kv_transfer=is_linked(self, "prefill_worker"))
        self.activity: WorkerReporter | None = None  # in a graph only
        self.prefills: RemotePrefill | None = None  # with PrefillWorkers only

    @property
    def remote_prefill(self) -> bool:
        return self._remote_prefill

    @remote_prefill.setter
    def remote_prefill(self, wanted: bool) -> None:
        if wanted and not is_linked(self, "prefill_worker"):
            raise ConfigError(
                "remote-prefill: true needs a PrefillWorker, which is not in this graph",
                hint="serve graphs.disagg:Frontend or graphs.disagg_router:Frontend",
            )
        self._remote_prefill = wanted

    @async_on_start
    async def start(self) -> None:
        context = service_context()
        if context is None:
            self.info = await self.engine.start()
            return  # plain Python: a test, or a debugger
        runtime = context.runtime
        tells = self.tells_kv_events and self._listen()
        if not await self.start_engine():
            return
        info = self.info
        self.activity = WorkerReporter(
            runtime.instance_id,
            self.engine,
            info,
            kv_events=tells,
            publish_kv=self.kv_events.publish,
            publish_load=self.load.publish,
            generate=self._generate,
        )
        self.count("generate", runtime.instance_id)
        if is_linked(self, "prefill_worker"):
            self.prefills = await self._ask_prefill_workers(runtime, self.activity)
        namespace, component = self.dynamo_address()
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
        await runtime.publish(model_key(card.name, runtime.instance_id), card)
        self.activity.start()

    async def _ask_prefill_workers(self, runtime: ProcessRuntime, activity: WorkerReporter) -> RemotePrefill:
        from dynamo.llm.disagg_metrics import DecodeMetrics  # here, so that a dry run does not import prometheus_client

        prefills = RemotePrefill(
            self.engine.generate,
            tasks=self.prefill_worker.tasks,
            workers=lambda: instance_ids(self.prefill_worker),
            at=lambda worker: direct(self.prefill_worker, worker),
            hit=activity.hit,
            rules=self._rules,
            timeout_s=lambda: self.prefill_timeout_s,
            reply=f"{'.'.join(self.dynamo_address())}.prefill_offers.{runtime.instance_id:x}",
            metrics=DecodeMetrics(metrics_registry()),
        )
        await runtime.listen(prefills.reply, prefills.take_offer)
        return prefills

    def _rules(self) -> Rules:
        return Rules(
            self.remote_prefill, self.conditional_disagg, self.max_local_prefill_length, self.max_prefill_queue_size
        )

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
        if self.prefills is not None:
            request = msgspec.structs.replace(request)  # its own, which changes when the prompt is computed elsewhere
        return self.activity.generate(request)

    def _generate(self, request: GenerateRequest) -> Stream[Delta]:
        return self.engine.generate(request) if self.prefills is None else self.prefills.generate(request)

    @endpoint
    def kv_snapshot(self, request: SnapshotRequest) -> Stream[KvSnapshot]:
        """All blocks in the KV caches, rank by rank."""
        if self.activity is not None:
            return self.activity.snapshot()
        nothing: Channel[KvSnapshot] = Channel()
        nothing.end()
        return Stream(nothing)

    @on_shutdown
    async def stop(self) -> None:
        if self.activity is not None:
            await self.activity.stop()
        if self.prefills is not None:
            await self.prefills.stop()
        await super().stop()


if __name__ == "__main__":  # python -m components.worker -f configs/agg.yaml: this service alone, under a debugger too
    from dynamo.launcher.foreground import alone

    alone(VllmWorker)

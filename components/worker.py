"""VllmWorker: an engine behind an endpoint. It publishes a model card, its load and the contents of its KV cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from components.engine_service import EngineService
from components.prefill_worker import PrefillWorker
from dynamo.config.provenance import canonical
from dynamo.config.upstream_keys import Change
from dynamo.errors import ConfigError
from dynamo.kv_router.events import KvEvents, KvSnapshot, SnapshotRequest, WorkerLoad
from dynamo.llm.cached_blocks import CachedBlocks
from dynamo.llm.engine import Generate
from dynamo.llm.protocol import Delta, GenerateRequest, ModelCard, model_key
from dynamo.llm.remote_prefill import RemotePrefill
from dynamo.llm.worker_reporter import WorkerReporter
from dynamo.sdk import (
    Stream,
    Topic,
    async_on_start,
    depends,
    endpoint,
    is_linked,
    metrics_registry,
    on_shutdown,
    service,
    service_context,
)
from dynamo.sdk.context import ProcessRuntime, ServiceContext
from dynamo.streams import Channel

if TYPE_CHECKING:
    from dynamo.compat.router_events import CachePublisher

log = logging.getLogger(__name__)


@service(dynamo={"namespace": "dynamo"}, resources={"gpu": 1, "cpu": "10", "memory": "20Gi"}, workers=1)
class VllmWorker(EngineService):
    """Generates tokens. Settings that are not parameters here are passed to vLLM as its command-line flags."""

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

    @classmethod
    def wanted_dependencies(cls, settings: Mapping[str, Any]) -> Collection[str]:
        """Return the dependency on prefill workers with `remote-prefill`: another command may start them."""
        given = {canonical(key): value for key, value in settings.items()}.get("remote-prefill")
        return ("prefill_worker",) if str(given).lower() in ("true", "1") else ()

    @classmethod
    def exchanges_kv(cls, settings: Mapping[str, Any], services: Collection[str]) -> bool:
        return "PrefillWorker" in services or bool(cls.wanted_dependencies(settings))

    @classmethod
    def upgrade_setting(
        cls, key: str, value: Any, settings: Mapping[str, Any], services: Collection[str]
    ) -> Change | None:
        if (
            canonical(key) == "remote-prefill"
            and "PrefillWorker" not in services
            and cls.wanted_dependencies({key: value})
        ):
            return Change(
                "prompts go to those that other commands start; give all commands the same NATS_SERVER, ETCD_ENDPOINTS and "
                "DYNAMO_KV_SECRET",
                {key: value},
                "this graph has no PrefillWorker",
            )
        return super().upgrade_setting(key, value, settings, services)

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
            router: how the Processor chooses workers; here it decides the default of kv_events only.
            speedup_ratio: divides the mock engine's modelled times; 0: no waiting.
            kv_events: publish the contents of the KV cache, which needs prefix caching; None: if router begins with kv,
                or with remote_prefill, which depends on what is cached.
            remote_prefill: let PrefillWorkers compute prompts.
            conditional_disagg: only long prompts, and only while the prefill queue is short; False: all prompts.
            max_local_prefill_length: a prompt is long if more tokens of it than this are not cached here.
            max_prefill_queue_size: the prefill queue is short while fewer tasks than this wait in it.
            prefill_timeout_s: time limit for a prompt to wait in the queue and be computed there; then it is computed here.
        """
        self.router = router
        named = engine_args.get("served-model-name", engine_args.get("served_model_name", model))
        self.served_name = str(named[0] if isinstance(named, list) else named)
        self.prefix_caching = engine_args.get("enable-prefix-caching", engine_args.get("enable_prefix_caching"))
        if kv_events is None:
            kv_events = router.startswith("kv") or remote_prefill
        self.publish_kv_events = kv_events
        self.remote_prefill = remote_prefill
        self.conditional_disagg = conditional_disagg
        self.max_local_prefill_length = max_local_prefill_length
        self.max_prefill_queue_size = max_prefill_queue_size
        self.prefill_timeout_s = prefill_timeout_s
        super().__init__(model, engine, speedup_ratio, engine_args, kv_transfer=is_linked(self, "prefill_worker"))
        self.prefill_client: RemotePrefill | None = None
        """only in a graph with PrefillWorkers"""
        self.reporter: WorkerReporter | None = None
        """only in a graph"""
        self.router_events: CachePublisher | None = None
        """only in a graph, if the engine emits KV events"""

    @property
    def remote_prefill(self) -> bool:
        return self._remote_prefill

    @remote_prefill.setter
    def remote_prefill(self, enabled: bool) -> None:
        if enabled and not is_linked(self, "prefill_worker"):
            raise ConfigError(
                "remote-prefill: true needs a PrefillWorker, which is not in this graph",
                hint="serve graphs.disagg:Frontend, or start this worker with remote-prefill: true",
            )
        self._remote_prefill = enabled

    @async_on_start
    async def start(self) -> None:
        context = service_context()
        if context is None:  # used as plain Python, in a test or a debugger
            self.info = await self.engine.start()
            return
        runtime = context.runtime
        cached_blocks = CachedBlocks()
        if self.publish_kv_events:
            self._follow_kv_events(cached_blocks)
        if not await self.start_engine():
            return
        cached_blocks.open(self.info)
        if cached_blocks.reported:
            await self._serve_other_routers(cached_blocks, runtime)
        # a request passes through the reporter, the prefill client if there is one, and the engine
        generate: Generate = self.engine.generate
        if is_linked(self, "prefill_worker"):
            self.prefill_client = self._make_prefill_client(generate, cached_blocks, runtime)
            await runtime.listen(self.prefill_client.offers_subject, self.prefill_client.on_offer)
            generate = self.prefill_client.generate
        self.reporter = WorkerReporter(
            generate,
            engine=self.engine,
            info=self.info,
            instance_id=runtime.instance_id,
            cached_blocks=cached_blocks,
            kv_events=self.kv_events,
            load=self.load,
        )
        self.export_engine_metrics("generate", runtime.instance_id)
        await self._publish_model_card(context)
        self.reporter.start()

    def _follow_kv_events(self, cached_blocks: CachedBlocks) -> None:
        if cached_blocks.follow(self.engine):
            return
        if self.prefix_caching is False:
            reason = "enable-prefix-caching is false"
        else:
            reason = f"the {self.engine_name} engine emits no KV events"
        log.warning("KV events disabled, routers cannot see this worker's cache: %s", reason)

    async def _serve_other_routers(self, cached_blocks: CachedBlocks, runtime: ProcessRuntime) -> None:
        """Publish KV events for Routers written for ai-dynamo, as long as one listens."""
        # imported here: a dry run needs none of it
        from dynamo.compat.router_events import CachePublisher

        publisher = CachePublisher(runtime, *self.dynamo_address(), runtime.instance_id, on_demand=True)
        block_size = self.info.kv_block_size
        cached_blocks.listeners.append(lambda events: publisher.publish_changes(events, block_size))
        await publisher.start()
        self.router_events = publisher

    def _make_prefill_client(
        self, generate: Generate, cached_blocks: CachedBlocks, runtime: ProcessRuntime
    ) -> RemotePrefill:
        # imported here: a dry run needs no prometheus_client
        from dynamo.llm.disagg_metrics import DecodeMetrics

        return RemotePrefill(
            generate,
            workers=self.prefill_worker,
            queue=self.prefill_worker.tasks,
            settings=self,
            cached_blocks=cached_blocks,
            offers_subject=f"{'.'.join(self.dynamo_address())}.prefill_offers.{runtime.instance_id:x}",
            metrics=DecodeMetrics(metrics_registry()),
        )

    async def _publish_model_card(self, context: ServiceContext) -> None:
        """Let frontends find the model; etcd removes the card when this process ends."""
        card = ModelCard(
            name=self.served_name,
            source=self.model,
            namespace=context.namespace,
            component=context.service_name,
            context_length=self.info.context_length,
            kv_block_size=self.info.kv_block_size,
            engine=self.engine_name,
            created=int(time.time()),
        )
        await context.runtime.publish(model_key(card.name, context.runtime.instance_id), card)

    @endpoint
    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        """Generate tokens. The request is changed on its way: a caller in this process must not reuse it."""
        if self.reporter is None:
            return self.engine.generate(request)
        return self.reporter.generate(request)

    @endpoint
    def kv_snapshot(self, request: SnapshotRequest) -> Stream[KvSnapshot]:
        """Return all blocks in the KV caches, rank by rank."""
        if self.reporter is not None:
            return self.reporter.snapshot()
        empty: Channel[KvSnapshot] = Channel()
        empty.end()
        return Stream(empty)

    @on_shutdown
    async def stop(self) -> None:
        if self.reporter is not None:
            await self.reporter.stop()
        if self.prefill_client is not None:
            await self.prefill_client.stop()
        await super().stop()
        if self.router_events is not None:
            await self.router_events.close()


if __name__ == "__main__":
    # this service alone, also under a debugger: python -m components.worker -f configs/agg.yaml
    from dynamo.launcher.foreground import alone

    alone(VllmWorker)

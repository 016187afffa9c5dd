"""VllmWorker: an engine, an endpoint, and a model card in etcd."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Literal

from dynamo.llm import engine as engines
from dynamo.llm.engines.installed import cpu_build, engine_arguments
from dynamo.llm.protocol import Delta, GenerateRequest, ModelCard, model_key
from dynamo.sdk import Service, Stream, async_on_start, dynamo_context, endpoint, liveness, on_shutdown, service

log = logging.getLogger(__name__)


@service(dynamo={"namespace": "dynamo"}, resources={"gpu": 1, "cpu": "10", "memory": "20Gi"}, workers=1)
class VllmWorker(Service):
    """Computes tokens. Keys of the configuration that are not parameters here go to vLLM as its command-line flags."""

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
        **engine_args: Any,
    ) -> None:
        """
        Args:
            model: a directory, a Hugging Face id, or dynamo-tiny.
            engine: vllm, or mock: deterministic tokens at a modelled pace, without a model.
            router: how requests reach this worker; the Processor decides, this is for the record.
            speedup_ratio: divides the mock engine's modelled times; 0: no waiting.
        """
        self.model, self.router = model, router
        if speedup_ratio is not None and engine == "mock":
            engine_args["speedup-ratio"] = speedup_ratio
        named = engine_args.get("served-model-name", engine_args.get("served_model_name", model))
        self.served_name = str(named[0] if isinstance(named, list) else named)
        self.engine_name = engine
        self.engine = engines.create(engine, model, engine_args, self._progress)

    def _progress(self, text: str) -> None:
        report = dynamo_context.get("progress")
        if report is not None:
            report(text)

    @async_on_start
    async def start(self) -> None:
        info = await self.engine.start()
        runtime = dynamo_context.get("runtime")
        if runtime is None:
            return  # plain Python: a test, or a debugger
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
        await runtime.connect()
        await runtime.publish(model_key(card.name, runtime.instance_id), card)

    @endpoint
    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        return self.engine.generate(request)

    @liveness
    async def healthy(self) -> bool:
        await self.engine.check_health()
        return True

    @on_shutdown
    async def stop(self) -> None:
        await self.engine.stop()


if __name__ == "__main__":  # python -m components.worker -f configs/agg.yaml: this service alone, under a debugger too
    from dynamo.serve.foreground import alone

    alone(VllmWorker)

"""PrefillWorker: computes the KV of prompts that VllmWorkers decode."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

from components.engine_service import EngineService
from dynamo import codec
from dynamo.context import request_id
from dynamo.errors import DynamoError, TransportError, UnavailableError
from dynamo.llm.disagg import PrefillOffer, PrefillRequest, PrefillTask
from dynamo.sdk import Job, WorkQueue, async_on_start, endpoint, metrics_registry, on_shutdown, service, service_context

log = logging.getLogger(__name__)

OFFER_S = 1.0
"""How long a decode worker may take to answer an offer; it takes a millisecond. One that does not has gone."""
GONE_OFFER_S = 0.1
"""The same for one that did not answer before."""
RETRY_S = 1.0
MEASURE_S = 1.0


class _Offer:
    """A task in hand, until its decode worker has its answer or does not want it."""

    def __init__(self) -> None:
        self.answered, self.ended = asyncio.Event(), asyncio.Event()

    def end(self) -> None:
        self.answered.set()
        self.ended.set()


@service(dynamo={"namespace": "dynamo"}, resources={"gpu": 1, "cpu": "10", "memory": "20Gi"}, workers=1)
class PrefillWorker(EngineService):
    """Any number of it works on one queue. Keys that are not parameters here go to vLLM as its command-line flags."""

    tasks = WorkQueue(PrefillTask, max_age_s=120.0, lost_after_s=2.0)

    def __init__(
        self,
        model: str = "",
        engine: Literal["vllm", "mock"] = "vllm",
        max_prefills: int = 4,
        speedup_ratio: float | None = None,
        **engine_args: Any,
    ) -> None:
        """
        Args:
            model: the decode workers' model: a directory, a Hugging Face id, or dynamo-tiny.
            engine: vllm, or mock: deterministic tokens at a modelled pace, without a model.
            max_prefills: prompts taken from the queue at a time: enough to fill the engine's steps, and no more than
                that, so that the others are left to the other prefill workers.
            speedup_ratio: divides the mock engine's modelled times; 0: no waiting.
        """
        super().__init__(model, engine, speedup_ratio, engine_args, kv_transfer=True)
        self.max_prefills = max_prefills
        self.done = 0
        self._offers: dict[str, _Offer] = {}
        self._silent: set[str] = set()  # the subjects of decode workers that did not answer
        self._work: list[asyncio.Task[None]] = []

    @async_on_start
    async def start(self) -> None:
        context = service_context()
        if not await self.start_engine() or context is None:
            return  # without a context: plain Python, in a test or a debugger
        # here, so that a dry run does not import prometheus_client
        from dynamo.llm.disagg_metrics import PrefillMetrics

        self.runtime = context.runtime
        self.count("prefill", self.runtime.instance_id)
        self.metrics = PrefillMetrics(metrics_registry())
        self.metrics.in_hand.set_function(lambda: len(self._offers))
        loop = asyncio.get_running_loop()
        self._work = [loop.create_task(self._take()), loop.create_task(self._measure())]

    def stats_data(self) -> dict[str, float]:
        return {**super().stats_data(), "prefills_done": self.done, "prefills_in_hand": len(self._offers)}

    async def _take(self) -> None:
        """Tasks from the queue, until the process stops; those in hand may be finished then."""
        async with asyncio.TaskGroup() as offering:
            while True:
                try:
                    async for job in self.tasks.take(self.max_prefills):
                        offering.create_task(self._offer(job))
                        del job  # the queue must see when nobody works on it
                    return
                except TransportError as error:
                    log.warning("no tasks, trying again: %s", error.message)
                    await asyncio.sleep(RETRY_S)

    async def _offer(self, job: Job[PrefillTask]) -> None:
        """Keep the task until its decode worker has its answer; then, or when nobody wants it, it is done."""
        task, runtime = job.task, self.runtime
        request_id.set(task.request_id)  # this runs in a task of its own
        log.debug("offering to prefill %d tokens, task %s", task.prompt_tokens, task.id)
        offer = self._offers[task.id] = _Offer()
        try:
            await runtime.send(task.reply, codec.encode(PrefillOffer(task.id, runtime.instance_id)))
            async with asyncio.timeout(GONE_OFFER_S if task.reply in self._silent else OFFER_S):
                await offer.answered.wait()
            self._silent.discard(task.reply)
            await offer.ended.wait()
        except TimeoutError:
            self._silent.add(task.reply)
            self.metrics.unwanted.inc()
        except TransportError as error:  # NATS is away: whoever asked computes by itself
            log.debug("task %s not offered: %s", task.id, error.message)
        finally:
            del self._offers[task.id]
        try:
            await job.done()
        except TransportError as error:  # another worker gets it, and its offer is declined
            log.debug("%s", error.message)

    @endpoint
    async def prefill(self, request: PrefillRequest) -> dict[str, Any]:
        """Compute a prompt that was offered; what comes is its `kv_transfer`. Raises UnavailableError when it is not
        offered any more."""
        offer = self._offers.get(request.task)
        if offer is None or offer.answered.is_set():
            raise UnavailableError(f"prefill task {request.task} is not offered any more")
        offer.answered.set()
        try:
            kv_transfer = await self.engine.prefill(request.request)
        except (DynamoError, asyncio.CancelledError):
            self.metrics.failed.inc()
            raise
        finally:
            offer.end()
        self.done += 1
        self.metrics.done.inc()
        self.metrics.tokens.inc(len(request.request.token_ids))
        return kv_transfer

    @endpoint
    async def decline(self, task: str) -> None:
        """Nobody wants that task any more."""
        offer = self._offers.get(task)
        if offer is not None and not offer.answered.is_set():
            self.metrics.unwanted.inc()
            offer.end()

    async def _measure(self) -> None:
        while True:
            try:
                self.metrics.waiting.set(await self.tasks.waiting())
            except DynamoError as error:
                log.debug("%s", error.message)
            await asyncio.sleep(MEASURE_S)

    @on_shutdown
    async def stop(self) -> None:
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await super().stop()


if __name__ == "__main__":  # python -m components.prefill_worker -f configs/disagg.yaml: this service alone
    from dynamo.launcher.foreground import alone

    alone(PrefillWorker)

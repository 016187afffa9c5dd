"""PrefillWorker: computes the KV of prompts for VllmWorkers, which fetch it and generate the tokens."""

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
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 1.0
"""Time for a decode worker to answer an offer. A live one takes a millisecond; one that does not answer is lost."""
UNRESPONSIVE_TIMEOUT_S = 0.1
"""The same for a decode worker that did not answer its last offer."""
RETRY_S = 1.0
MEASURE_INTERVAL_S = 1.0


class _Offer:
    """A task taken from the queue, until its prompt is computed or no longer needed."""

    def __init__(self) -> None:
        self.answered = asyncio.Event()
        self.ended = asyncio.Event()

    def end(self) -> None:
        """End the offer, whether it was answered or not."""
        self.answered.set()
        self.ended.set()


@service(dynamo={"namespace": "dynamo"}, resources={"gpu": 1, "cpu": "10", "memory": "20Gi"}, workers=1)
class PrefillWorker(EngineService):
    """Computes prompts; any number of them share one queue. Settings that are not parameters here are vLLM's flags."""

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
            max_prefills: prompts taken from the queue at a time: enough to fill the engine's steps, and no more, so that
                the rest is left to the other prefill workers.
            speedup_ratio: divides the mock engine's modelled times; 0: no waiting.
        """
        super().__init__(model, engine, speedup_ratio, engine_args, kv_transfer=True)
        self.max_prefills = max_prefills
        self.done = 0  # prompts computed
        self._waiting: int | None = None  # tasks that no prefill worker has taken; None: unknown
        self._offers: dict[str, _Offer] = {}  # by task id
        self._unresponsive: set[str] = set()  # subjects of decode workers that did not answer their last offer
        self._background = TaskSet("prefill worker")

    @async_on_start
    async def start(self) -> None:
        context = service_context()
        if not await self.start_engine() or context is None:
            return  # without a context: plain Python, in a test or a debugger
        # imported here: a dry run needs no prometheus_client
        from dynamo.llm.disagg_metrics import PrefillMetrics

        self.runtime = context.runtime
        self.export_engine_metrics("prefill", self.runtime.instance_id)
        self.metrics = PrefillMetrics(metrics_registry())
        self.metrics.in_hand.set_function(lambda: len(self._offers))
        self._background.spawn(self._accept_jobs(), name="accept jobs")
        self._background.spawn(self._measure_queue(), name="measure the queue")

    def stats_data(self) -> dict[str, float]:
        stats = {**super().stats_data(), "prefills_done": self.done, "prefills_in_hand": len(self._offers)}
        return stats if self._waiting is None else {**stats, "prefill_queue_waiting": self._waiting}

    async def _accept_jobs(self) -> None:
        """Take tasks from the queue until the process stops, which lets those in hand finish."""
        async with asyncio.TaskGroup() as offers:
            while True:
                try:
                    async for job in self.tasks.take(self.max_prefills):
                        offers.create_task(self._offer(job))
                        del job  # this loop must not keep the job alive: the queue notices when no task refers to it
                    return
                except TransportError as error:
                    log.warning("prefill queue unreachable, retrying: %s", error.message)
                    await asyncio.sleep(RETRY_S)

    async def _offer(self, job: Job[PrefillTask]) -> None:
        """Offer a task to its decode worker and keep it until the prompt is computed or no longer needed."""
        task = job.task
        request_id.set(task.request_id)  # this runs in a task of its own
        log.debug("offering to prefill %d tokens, task %s", task.prompt_tokens, task.id)
        offer = self._offers[task.id] = _Offer()
        try:
            await self.runtime.send(task.reply, codec.encode(PrefillOffer(task.id, self.runtime.instance_id)))
            timeout_s = UNRESPONSIVE_TIMEOUT_S if task.reply in self._unresponsive else ANSWER_TIMEOUT_S
            async with asyncio.timeout(timeout_s):
                await offer.answered.wait()
            self._unresponsive.discard(task.reply)
            await offer.ended.wait()
        except TimeoutError:
            self._unresponsive.add(task.reply)
            self.metrics.unwanted.inc()
        except TransportError as error:  # NATS is lost: the decode worker computes the prompt itself
            log.debug("task %s not offered: %s", task.id, error.message)
        finally:
            del self._offers[task.id]
        try:
            await job.done()
        except TransportError as error:  # another prefill worker gets the task, and its offer is declined
            log.debug("task %s not acknowledged: %s", task.id, error.message)

    @endpoint
    async def prefill(self, request: PrefillRequest) -> dict[str, Any]:
        """Compute a prompt that was offered and return its `kv_transfer`.

        Raises UnavailableError if the task is no longer on offer.
        """
        offer = self._offers.get(request.task)
        if offer is None or offer.answered.is_set():
            raise UnavailableError(f"prefill task {request.task} is no longer on offer")
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
        """Drop a task that was offered: its decode worker no longer needs it."""
        offer = self._offers.get(task)
        if offer is not None and not offer.answered.is_set():
            self.metrics.unwanted.inc()
            offer.end()

    async def _measure_queue(self) -> None:
        """Keep the metric of the queue's length up to date."""
        while True:
            try:
                self._waiting = await self.tasks.waiting()
                self.metrics.waiting.set(self._waiting)
            except DynamoError as error:
                self._waiting = None
                log.debug("length of the prefill queue unknown: %s", error.message)
            await asyncio.sleep(MEASURE_INTERVAL_S)

    @on_shutdown
    async def stop(self) -> None:
        await self._background.aclose()
        await super().stop()


if __name__ == "__main__":
    # this service alone: python -m components.prefill_worker -f configs/disagg.yaml
    from dynamo.launcher.foreground import alone

    alone(PrefillWorker)

"""The decode worker's side of disaggregated prefill: decide, request, wait, and compute the prompt here if that fails."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import msgspec

from dynamo import codec
from dynamo.context import request_id
from dynamo.errors import DynamoError, NoInstancesError, RequestError, TransportError, UnavailableError
from dynamo.llm.cached_blocks import CachedBlocks
from dynamo.llm.disagg import (
    PrefillOffer,
    PrefillQueue,
    PrefillRequest,
    PrefillSettings,
    PrefillTask,
    PrefillWorkers,
    local_prefill_reason,
)
from dynamo.llm.engine import Generate
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.sdk.depends import direct, instance_ids
from dynamo.streams import Stream
from dynamo.tasks import TaskSet

if TYPE_CHECKING:
    from dynamo.llm.disagg_metrics import DecodeMetrics

log = logging.getLogger(__name__)

MAX_TRIES = 3
"""prefill workers that may take a prompt and be lost before it is computed here"""
POLL_S = 0.1
"""interval at which a waiting task is checked for live prefill workers"""
POLLS_PER_QUEUE_CHECK = 10
"""such checks between two checks that the queue itself is reachable"""
WARNING_INTERVAL_S = 30.0

_decode_offer = codec.decoder(PrefillOffer)


class RemotePrefill:
    """A `generate` that lets prefill workers compute prompts, in front of an engine's `generate`.

    Offers of prefill workers arrive as messages on `offers_subject`: pass their payloads to `on_offer`.
    """

    def __init__(
        self,
        generate: Generate,
        *,
        workers: PrefillWorkers,
        queue: PrefillQueue,
        settings: PrefillSettings,
        cached_blocks: CachedBlocks,
        offers_subject: str,
        metrics: DecodeMetrics,
    ) -> None:
        """`workers` is the stub of the service, behind which `instance_ids` finds the live prefill workers."""
        self.offers_subject = offers_subject
        self._engine_generate = generate
        self._workers = workers
        self._queue = queue
        self._settings = settings
        self._cached_blocks = cached_blocks
        self._metrics = metrics
        self._awaited_offers: dict[str, asyncio.Future[int]] = {}
        """by task id; the result is the instance id of the worker that offers to compute it"""
        self._background = TaskSet("remote prefill")
        self._warned_s = float("-inf")

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        """Return the deltas of a request.

        Sets the request's `kv_transfer`, and `expected_hit` to the whole prompt while another worker computes it.
        """
        if not self._settings.remote_prefill or request.kv_transfer is not None:
            return self._engine_generate(request)
        reason = self._local_reason(request)
        if reason is None:
            return Stream.opening(self._generate_remotely(request))
        self._metrics.local(reason)
        return self._engine_generate(request)

    def _local_reason(self, request: GenerateRequest) -> str | None:
        """Return why the prompt is computed here, as far as this process can decide; None: ask the queue."""
        prompt_tokens = len(request.token_ids)
        settings = self._settings
        if request.sampling.n > 1 or request.sampling.prompt_logprobs is not None:
            return "request"
        if not instance_ids(self._workers):
            return "no-worker"
        if settings.conditional_disagg and prompt_tokens <= settings.max_local_prefill_length:
            return "short"  # even if none of it is cached
        new_tokens = prompt_tokens - self._cached_blocks.hit_tokens(request)
        return local_prefill_reason(settings, new_tokens, len(self._awaited_offers))

    async def _generate_remotely(self, request: GenerateRequest) -> Stream[Delta]:
        prompt_tokens = len(request.token_ids)
        expected_hit = request.expected_hit
        started_s = time.monotonic()
        timeout_s = self._settings.prefill_timeout_s
        request.expected_hit = prompt_tokens  # none of the prompt is this worker's load
        reason: str | None = None
        try:
            async with asyncio.timeout(timeout_s):
                if await self._queue_is_full():
                    reason = "queue"
                else:
                    request.kv_transfer = await self._prefill(request)
        except TimeoutError:
            reason = "timeout"
            self._warn(f"not done in {timeout_s:g} s")
        except RequestError as error:  # this engine refuses the request as well, or is able to run it
            reason = "failed"
            log.debug("prefill worker refused the request: %s", error.message)
        except DynamoError as error:
            reason = "failed"
            self._warn(error.message)
        if reason is None:
            self._metrics.remote(prompt_tokens, time.monotonic() - started_s)
            return self._measure_transfer(self._engine_generate(request))
        self._metrics.local(reason)
        request.expected_hit = expected_hit
        return self._engine_generate(request)

    async def _queue_is_full(self) -> bool:
        settings = self._settings
        return settings.conditional_disagg and await self._queue.waiting() >= settings.max_prefill_queue_size

    async def _prefill(self, request: GenerateRequest) -> dict[str, Any]:
        """Return the `kv_transfer` of the first prefill worker that takes the prompt and completes it.

        Cancelling stops the computation. Raises DynamoError if no worker completes it.
        """
        prefill = msgspec.structs.replace(request, expected_hit=0, rank=None, final_only=False)
        tries = 0
        while True:
            tries += 1
            task = PrefillTask(os.urandom(8).hex(), len(request.token_ids), self.offers_subject, request_id.get())
            worker = await self._enqueue(task)
            try:
                return await direct(self._workers, worker).prefill(PrefillRequest(task.id, prefill))
            except (UnavailableError, TransportError) as error:
                if tries == MAX_TRIES or not instance_ids(self._workers):
                    raise
                log.debug("retrying prefill of %d tokens on another worker: %s", task.prompt_tokens, error.message)

    async def _enqueue(self, task: PrefillTask) -> int:
        """Put a task on the queue and return the id of the worker that offers to compute it.

        Raises NoInstancesError when no prefill worker is left, TransportError when the queue is unreachable.
        """
        offer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._awaited_offers[task.id] = offer
        polls = 0
        try:
            await self._queue.put(task)
            while True:
                await asyncio.wait((offer,), timeout=POLL_S)
                if offer.done():
                    return offer.result()
                if not instance_ids(self._workers):
                    raise NoInstancesError("no prefill worker is left")
                polls += 1
                if polls % POLLS_PER_QUEUE_CHECK == 0:
                    await self._queue.waiting()  # raises if NATS is lost: no offer would arrive
        finally:
            del self._awaited_offers[task.id]

    def on_offer(self, payload: bytes) -> None:
        """Handle a message on `offers_subject`."""
        try:
            offer: PrefillOffer = _decode_offer(payload)
        except RequestError as error:
            log.error("invalid prefill offer dropped: %s", error.message)
            return
        awaited = self._awaited_offers.get(offer.task)
        if awaited is not None and not awaited.done():
            awaited.set_result(offer.worker)
        else:  # the request was cancelled, computed here, or taken by another worker
            self._background.spawn(self._decline(offer), name="decline offer")

    async def _decline(self, offer: PrefillOffer) -> None:
        try:
            await direct(self._workers, offer.worker).decline(offer.task)
        except DynamoError as error:  # the worker's offer expires
            log.debug("offer of task %s by worker %x not declined: %s", offer.task, offer.worker, error.message)

    def _measure_transfer(self, stream: Stream[Delta]) -> Stream[Delta]:
        """Record the time until the first delta."""
        started_s: float | None = time.monotonic()

        def on_delta(delta: Delta) -> Delta:
            nonlocal started_s
            if started_s is not None:
                self._metrics.transferred(time.monotonic() - started_s)
                started_s = None
            return delta

        return stream.map(on_delta)

    def _warn(self, reason: str) -> None:
        """Log a failure, at most every WARNING_INTERVAL_S."""
        now_s = time.monotonic()
        if now_s - self._warned_s > WARNING_INTERVAL_S:
            self._warned_s = now_s
            log.warning("remote prefill failed, decode workers compute prompts themselves: %s", reason)

    async def stop(self) -> None:
        """Cancel what runs in the background."""
        await self._background.aclose()

"""The decode worker's side of prefill by another worker: decide, ask, wait, and compute here if anything fails."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from dynamo import codec
from dynamo.context import request_id
from dynamo.errors import DynamoError, NoInstancesError, RequestError, TransportError, UnavailableError
from dynamo.llm.disagg import (
    Prefiller,
    PrefillOffer,
    PrefillRequest,
    PrefillTask,
    PrefillTasks,
    Rules,
    local_reason,
)
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.streams import Stream

if TYPE_CHECKING:
    from dynamo.llm.disagg_metrics import DecodeMetrics

log = logging.getLogger(__name__)

TRIES = 3
"""prefill workers that may take a prompt and die before it is computed here"""
LOOK_S = 0.1
"""how often a task that waits is checked for having anybody to wait for"""
LOOKS_AT_QUEUE = 10
"""such checks from one question to the queue, whether it is there at all, to the next"""
COMPLAIN_S = 30.0

_decode_offer = codec.decoder(PrefillOffer)


class RemotePrefill:
    """Stands before an engine's `generate`.

    `workers` gives the ids of the live prefill workers, `at` the endpoints of one; `hit` the prompt tokens in this
    engine's prefix cache; `reply` is the subject whose messages go to `take_offer`. `timeout_s` is how long a prompt may
    be on its way, with the wait in the queue, before it is computed here.
    """

    def __init__(
        self,
        generate: Callable[[GenerateRequest], Stream[Delta]],
        *,
        tasks: PrefillTasks,
        workers: Callable[[], Sequence[int]],
        at: Callable[[int], Prefiller],
        hit: Callable[[GenerateRequest], int],
        rules: Callable[[], Rules],
        timeout_s: Callable[[], float],
        reply: str,
        metrics: DecodeMetrics,
    ) -> None:
        self._engine_generate, self._tasks, self._workers, self._at = generate, tasks, workers, at
        self._hit, self._rules, self._timeout_s, self.reply, self._metrics = hit, rules, timeout_s, reply, metrics
        self._wanted: dict[str, asyncio.Future[int]] = {}
        self._declining: set[asyncio.Task[None]] = set()
        self._complained_s = float("-inf")

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        """`expected_hit` and `kv_transfer` of the request are changed: it must be the worker's own."""
        rules = self._rules()
        if not rules.remote_prefill or request.kv_transfer is not None:
            return self._engine_generate(request)
        why = self._local_reason(request, rules)
        if why is None:
            return Stream.opening(self._generate(request, rules))
        self._metrics.local(why)
        return self._engine_generate(request)

    def _local_reason(self, request: GenerateRequest, rules: Rules) -> str | None:
        if request.sampling.n > 1 or request.sampling.prompt_logprobs is not None:
            return "request"
        if not self._workers():
            return "no-worker"
        if rules.conditional_disagg and len(request.token_ids) <= rules.max_local_prefill_length:
            return "short"  # whatever is cached
        return local_reason(rules, len(request.token_ids) - self._hit(request), len(self._wanted))

    async def _generate(self, request: GenerateRequest, rules: Rules) -> Stream[Delta]:
        expected_hit, started = request.expected_hit, time.monotonic()
        request.expected_hit = len(request.token_ids)  # nothing of it is this worker's load
        try:
            async with asyncio.timeout(self._timeout_s()):
                waiting = await self._tasks.waiting() if rules.conditional_disagg else 0
                why: str | None = local_reason(rules, len(request.token_ids), waiting)
                if why is None:
                    request.kv_transfer = await self._prefill(request)
        except TimeoutError:
            why = "timeout"
            self._complain(f"not done in {self._timeout_s():g} s")
        except RequestError as error:  # this engine will say the same, or can do what the other cannot
            why = "failed"
            log.debug("prefill refused: %s", error.message)
        except DynamoError as error:
            why = "failed"
            self._complain(error.message)
        if why is None:
            self._metrics.remote(len(request.token_ids), time.monotonic() - started)
            return self._timed(self._engine_generate(request))
        self._metrics.local(why)
        request.expected_hit = expected_hit
        return self._engine_generate(request)

    async def _prefill(self, request: GenerateRequest) -> dict[str, Any]:
        """By the first worker that takes it and lives. Cancelling it stops whoever computes."""
        asked = msgspec.structs.replace(request, expected_hit=0, rank=None, final_only=False)
        for left in reversed(range(TRIES)):
            task = PrefillTask(os.urandom(8).hex(), len(request.token_ids), self.reply, request_id.get())
            worker = await self._offered(task)
            try:
                return await self._at(worker).prefill(PrefillRequest(task.id, asked))
            except (UnavailableError, TransportError) as error:
                if not left or not self._workers():
                    raise
                log.debug("prefill of %d tokens goes to another worker: %s", task.prompt_tokens, error.message)
        raise AssertionError("the last try returns or raises")

    async def _offered(self, task: PrefillTask) -> int:
        """The worker that is free to do the task."""
        offered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._wanted[task.id] = offered
        try:
            await self._tasks.put(task)
            for look in itertools.count(1):
                await asyncio.wait((offered,), timeout=LOOK_S)
                if offered.done():
                    break
                if not self._workers():
                    raise NoInstancesError("no prefill worker is left")
                if look % LOOKS_AT_QUEUE == 0:
                    await self._tasks.waiting()  # raises when NATS is away: no offer would come
            return offered.result()
        finally:
            del self._wanted[task.id]

    def take_offer(self, payload: bytes) -> None:
        """A message on `reply`."""
        try:
            offer: PrefillOffer = _decode_offer(payload)
        except RequestError as error:
            log.error("an offer of a prefill worker dropped: %s", error.message)
            return
        offered = self._wanted.get(offer.task)
        if offered is not None and not offered.done():
            offered.set_result(offer.worker)
        else:  # cancelled, done here, or taken by another worker meanwhile
            self._spawn(self._decline(offer))

    async def _decline(self, offer: PrefillOffer) -> None:
        try:
            await self._at(offer.worker).decline(offer.task)
        except DynamoError as error:  # it will not wait for ever
            log.debug("task %s of worker %x not declined: %s", offer.task, offer.worker, error.message)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._declining.add(task)
        task.add_done_callback(self._declining.discard)

    def _timed(self, stream: Stream[Delta]) -> Stream[Delta]:
        started: float | None = time.monotonic()

        def see(delta: Delta) -> Delta:
            nonlocal started
            if started is not None:
                self._metrics.transferred(time.monotonic() - started)
                started = None
            return delta

        return stream.map(see)

    def _complain(self, reason: str) -> None:
        if time.monotonic() - self._complained_s > COMPLAIN_S:
            self._complained_s = time.monotonic()
            log.warning("prompts are computed by the workers that decode them: %s", reason)

    async def stop(self) -> None:
        for task in self._declining:
            task.cancel()
        await asyncio.gather(*self._declining, return_exceptions=True)

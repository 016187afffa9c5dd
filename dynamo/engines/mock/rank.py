"""One data-parallel rank of the mock engine on the event loop: one callback per step, none while it is idle."""

from __future__ import annotations

import asyncio
import logging
import time

from dynamo.engines.mock.block_pool import BlockPool
from dynamo.engines.mock.faults import Faults
from dynamo.engines.mock.generation import MockSequence
from dynamo.engines.mock.scheduler import Scheduler
from dynamo.engines.mock.settings import MockSettings
from dynamo.engines.mock.timing import step_ms
from dynamo.engines.mock.transfer import KvSource, fetch
from dynamo.errors import EngineError
from dynamo.llm.engine import EngineStats, KvListener, KvTransfers
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)


class MockRank:
    """A scheduler with its KV blocks, and the clock that its steps run by."""

    def __init__(self, number: int, settings: MockSettings, faults: Faults, listener: KvListener | None) -> None:
        self.number = number
        self.transfers = KvTransfers()
        pool = BlockPool(settings.num_gpu_blocks_override, settings.block_size, events=listener is not None)
        self.scheduler: Scheduler[MockSequence] = Scheduler(
            pool,
            batched_tokens=settings.max_num_batched_tokens,
            sequences=settings.max_num_seqs,
            chunked_prefill=settings.enable_chunked_prefill,
            prefix_caching=settings.enable_prefix_caching,
        )
        self._faults = faults
        self._listener = listener
        self._emit = faults.advance if faults.enabled else MockSequence.advance
        self._s_per_ms = settings.mock_slow_factor / settings.speedup_ratio / 1e3 if settings.speedup_ratio else 0.0
        self._kv_capacity_tokens = pool.usable * pool.block_size
        self._transfer_s_per_token = settings.mock_kv_bytes_per_token / settings.mock_kv_bandwidth_gb_s / 1e9
        self._transfer_bytes_per_token = settings.mock_kv_bytes_per_token
        self._fetches = TaskSet(f"mock rank {number}")
        self._loop = asyncio.get_running_loop()
        self._next_step: asyncio.Handle | None = None  # the end of the running step, or the start of the first
        self._step_end_s = 0.0
        self._stopped = False

    def __len__(self) -> int:
        return len(self.scheduler)

    def add(self, sequences: list[MockSequence]) -> None:
        """Queue the sequences of a request."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        self.wake()

    def wake(self) -> None:
        """Start stepping if the rank is idle; to be called after each change that may let a sequence run."""
        if self._next_step is None and len(self.scheduler) and not self._stopped:
            self._step_end_s = time.monotonic()  # requests of one turn of the loop share the first step
            self._next_step = self._loop.call_soon(self._begin_step)

    def free(self, sequence: MockSequence) -> None:
        """Free the blocks of a sequence that was kept after its end."""
        self.scheduler.free(sequence)
        self.wake()

    def stats(self) -> EngineStats:
        """Return the load at this moment."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.queued,
            kv_usage=scheduler.pool.usage,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
        )

    async def stop(self) -> None:
        """Stop stepping and fetching."""
        self._stopped = True
        if self._next_step is not None:
            self._next_step.cancel()
        await self._fetches.aclose()

    def _begin_step(self) -> None:
        step = self.scheduler.schedule()
        for sequence in self.scheduler.to_fetch:
            assert sequence.source is not None
            sequence.fetch = self._fetches.spawn(self._fetch(sequence, sequence.source), name="fetch KV")
        self.scheduler.to_fetch.clear()
        if step is None:
            self._next_step = None
        elif self._s_per_ms:
            now_s = time.monotonic()  # a late step shortens the next, so that the mean pace is kept
            kv_read = min(self.scheduler.kv_tokens / self._kv_capacity_tokens, 1.0)
            self._step_end_s = max(self._step_end_s + step_ms(step, kv_read) * self._s_per_ms, now_s)
            self._next_step = self._loop.call_later(self._step_end_s - now_s, self._end_step)
        else:
            self._next_step = self._loop.call_soon(self._end_step)

    def _end_step(self) -> None:
        if self._faults.frozen:
            return
        self.scheduler.complete(self._emit)
        if self._listener is not None and (events := self.scheduler.pool.drain_events()):
            self._listener(self.number, events)
        self._begin_step()

    async def _fetch(self, sequence: MockSequence, source: KvSource) -> None:
        """Fetch the KV of a prompt, apart from its cached blocks; the prompt is computed here if that fails."""
        missing = len(sequence.prompt) - sequence.cached_tokens
        started_s = time.monotonic()
        try:
            await fetch(source, missing * self._transfer_s_per_token * self._s_per_ms * 1e3)
        except EngineError as error:
            log.debug("computing a prompt of %d tokens here: %s", len(sequence.prompt), error.message)
            self.scheduler.not_fetched(sequence)
            transfer = KvTransfers(pulls=1, failures=1, seconds=time.monotonic() - started_s)
        else:
            self.scheduler.fetched(sequence)
            # as in vLLM: only tokens that no engine computed for this request
            sequence.cached_tokens = source.cached_tokens
            size_bytes = missing * self._transfer_bytes_per_token
            transfer = KvTransfers(pulls=1, bytes=size_bytes, seconds=time.monotonic() - started_s)
        self.transfers = self.transfers.plus(transfer)
        self.wake()

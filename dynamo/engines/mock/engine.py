"""The mock engine on an event loop: one callback for each step of each rank, none when there is nothing to do."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from dynamo.engines.mock.faults import Faults
from dynamo.engines.mock.kv_cache import KvCache
from dynamo.engines.mock.scheduler import Scheduler
from dynamo.engines.mock.settings import MockSettings, mock_settings
from dynamo.engines.mock.timing import step_ms
from dynamo.engines.mock.tokens import Choice, Generation, Vocabulary, packed, vocabulary
from dynamo.engines.mock.transfer import KvLender, KvPlace, fetch
from dynamo.errors import ContextLengthError, EngineDeadError, EngineError, RequestError
from dynamo.kv_router.hashing import block_hashes
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener, KvTransfers
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.streams import Channel, Stream

log = logging.getLogger(__name__)


class MockEngine:
    """Takes what `MockSettings` names. Requests go to the rank they name, or to that with the fewest sequences."""

    def __init__(self, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> None:
        self._settings = settings = mock_settings(arguments)
        self._model, self._progress = model, progress
        self._context = min(settings.max_model_len, *_capacities(settings))
        self._faults = Faults(settings)
        self._live: set[Generation] = set()
        self._vocabulary: Vocabulary = []
        self._ranks: list[Rank] = []
        self._listener: KvListener | None = None
        self._lender = KvLender(settings.kv_transfer_lease_s)

    async def start(self) -> EngineInfo:
        settings = self._settings
        self._progress("loading the tokenizer")
        self._vocabulary = vocabulary(self._model)
        if self._context < settings.max_model_len:
            log.warning("max-model-len %d is more than fits: %d tokens", settings.max_model_len, self._context)
        self._ranks = [Rank(number, settings, self._faults, self._listener) for number in range(self._count)]
        blocks, slots = settings.num_gpu_blocks_override, settings.max_num_seqs
        return EngineInfo(self._context, settings.block_size, blocks, self._count, slots)

    @property
    def _count(self) -> int:
        return self._settings.data_parallel_size

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        channel: Channel[Delta] = Channel()
        stream = Stream(channel)
        try:
            self._begin(request, channel)
        except RequestError as error:
            channel.end(error)
        return stream

    def _begin(
        self, request: GenerateRequest, channel: Channel[Delta], keep: Callable[[Choice], None] | None = None
    ) -> None:
        sampling, prompt = request.sampling, request.token_ids
        room = self._context - len(prompt)
        if sampling.logprobs is not None:
            raise RequestError("the mock engine gives no logprobs", param="logprobs")
        if not prompt:
            raise RequestError("the prompt has no tokens")
        if room < 1:
            raise ContextLengthError(f"{len(prompt)} prompt tokens do not fit {self._context}")
        if request.rank is not None and not 0 <= request.rank < self._count:
            raise RequestError(f"rank {request.rank}: the engine has {self._count}", param="rank")
        rank = min(self._ranks, key=Rank.__len__) if request.rank is None else self._ranks[request.rank]
        caching = self._settings.enable_prefix_caching
        try:
            seen, names = packed(prompt), block_hashes(prompt, self._settings.block_size) if caching else []
        except OverflowError:
            raise RequestError("a prompt token is not a number of 32 bits") from None
        limit = min(room, sampling.max_tokens or room)
        place = self._kv_place(request)
        generation = Generation(request, channel, rank.scheduler, self._live.discard)
        generation.keep = keep
        for index in range(sampling.n):
            choice = Choice(generation, index, names, seen, limit, self._vocabulary)
            choice.source, choice.fetches = place, place is not None
            generation.choices.append(choice)
        self._faults.choose(generation.choices[0])
        self._live.add(generation)

        def withdraw() -> None:
            generation.withdraw()
            rank.wake()

        channel.on_cancel = withdraw
        rank.add(generation.choices)

    def _kv_place(self, request: GenerateRequest) -> KvPlace | None:
        if request.kv_transfer is None or not self._settings.kv_transfer or request.sampling.n > 1:
            return None
        try:
            return msgspec.convert(request.kv_transfer, KvPlace)
        except msgspec.ValidationError as error:
            raise RequestError(f"kv_transfer is not of the mock engine: {error}", param="kv_transfer") from None

    async def prefill(self, request: GenerateRequest) -> dict[str, Any]:
        if not self._settings.kv_transfer:
            raise EngineError("this engine does not compute KV for others", hint="start it with kv-transfer: true")
        await self._lender.open()
        name = os.urandom(8).hex()

        def keep(choice: Choice) -> None:
            rank = next(rank for rank in self._ranks if rank.scheduler is choice.generation.scheduler)
            rank.scheduler.keep(choice)
            self._lender.keep(name, lambda: rank.free(choice))

        channel: Channel[Delta] = Channel()
        stream = Stream(channel)
        sampling = Sampling(max_tokens=1, ignore_eos=True, seed=request.sampling.seed)
        self._begin(msgspec.structs.replace(request, sampling=sampling, kv_transfer=None), channel, keep)
        try:
            deltas = [delta async for delta in stream]
        except BaseException:
            self._lender.drop(name)
            raise
        return self._lender.place(name, deltas[0].cached_tokens or 0)

    async def abort(self, request_id: str) -> None:
        for generation in [g for g in self._live if g.request.request_id == request_id]:
            generation.channel.cancel()

    def stats(self) -> list[EngineStats]:
        return [rank.stats() for rank in self._ranks]

    def kv_transfers(self) -> KvTransfers | None:
        if not self._settings.kv_transfer:
            return None
        found = KvTransfers(expired=self._lender.expired)
        for rank in self._ranks:
            found = found.plus(rank.transfers)
        return found

    def kv_events(self, listener: KvListener) -> bool:
        if not self._settings.enable_prefix_caching:
            return False
        self._listener = listener
        return True

    async def check_health(self) -> None:
        self._faults.check()

    async def stop(self) -> None:
        """Running requests end with an error."""
        for rank in self._ranks:
            await rank.stop()
        for generation in list(self._live):
            generation.end(EngineDeadError("the engine is stopping"))
        await self._lender.close()


def _capacities(settings: MockSettings) -> list[int]:
    """Tokens of the longest sequence that can run alone, by the KV cache and by the step."""
    found = [(settings.num_gpu_blocks_override - 1) * settings.block_size]
    return found if settings.enable_chunked_prefill else [*found, settings.max_num_batched_tokens]


class Rank:
    """One data-parallel engine: a scheduler, its KV cache, and the time."""

    def __init__(self, number: int, settings: MockSettings, faults: Faults, listener: KvListener | None) -> None:
        self.number, self._faults, self._listener = number, faults, listener
        cache = KvCache(settings.num_gpu_blocks_override, settings.block_size, events=listener is not None)
        self.scheduler: Scheduler[Choice] = Scheduler(
            cache,
            batched_tokens=settings.max_num_batched_tokens,
            sequences=settings.max_num_seqs,
            chunked_prefill=settings.enable_chunked_prefill,
            prefix_caching=settings.enable_prefix_caching,
        )
        self._emit = faults.advance if faults.wanted else Choice.advance
        self._s_per_ms = settings.mock_slow_factor / settings.speedup_ratio / 1e3 if settings.speedup_ratio else 0.0
        self._kv_tokens = self.scheduler.cache.usable * self.scheduler.cache.block_size
        self._loop = asyncio.get_running_loop()
        self._stepping: asyncio.Handle | None = None  # the end of the step, or the beginning of the first
        self._step_end = 0.0
        self._s_per_kv_token = settings.mock_kv_bytes_per_token / settings.mock_kv_bandwidth_gb_s / 1e9
        self._bytes_per_token = settings.mock_kv_bytes_per_token
        self.transfers = KvTransfers()
        self._fetches: set[asyncio.Task[None]] = set()
        self._stopped = False

    def __len__(self) -> int:
        return len(self.scheduler)

    def add(self, choices: list[Choice]) -> None:
        for choice in choices:
            self.scheduler.add(choice)
        self.wake()

    def wake(self) -> None:
        """Something may be done that could not be before."""
        if self._stepping is None and len(self.scheduler) and not self._stopped:
            self._step_end = time.monotonic()  # requests of one turn of the loop share the first step
            self._stepping = self._loop.call_soon(self._step)

    def free(self, choice: Choice) -> None:
        """The blocks that it was kept with."""
        self.scheduler.free(choice)
        self.wake()

    async def stop(self) -> None:
        self._stopped = True
        if self._stepping is not None:
            self._stepping.cancel()
        for task in self._fetches:
            task.cancel()
        await asyncio.gather(*self._fetches, return_exceptions=True)

    async def _fetch(self, choice: Choice, place: KvPlace) -> None:
        """As long as a transfer of what the prefix cache lacks takes."""
        scheduler, lacking = self.scheduler, len(choice.prompt) - choice.cached_tokens
        started, size, failures = time.monotonic(), lacking * self._bytes_per_token, 0
        try:
            await fetch(place, lacking * self._s_per_kv_token * self._s_per_ms * 1e3)
        except EngineError as error:
            log.debug("a prompt of %d tokens is computed here: %s", len(choice.prompt), error.message)
            scheduler.not_fetched(choice)
            size, failures = 0, 1
        else:
            scheduler.fetched(choice)
            choice.cached_tokens = place.cached_tokens  # as with vLLM: what nobody has computed for this request
        self.transfers = self.transfers.plus(KvTransfers(1, failures, size, time.monotonic() - started))
        self.wake()

    def _step(self) -> None:
        step = self.scheduler.schedule()
        for choice in self.scheduler.to_fetch:
            assert choice.source is not None
            task = choice.fetch = self._loop.create_task(self._fetch(choice, choice.source))
            self._fetches.add(task)
            task.add_done_callback(self._fetches.discard)
        self.scheduler.to_fetch.clear()
        if step is None:
            self._stepping = None
        elif self._s_per_ms:
            now = time.monotonic()  # a late step shortens the next, so that the pace is kept
            read = min(self.scheduler.kv_tokens / self._kv_tokens, 1.0)
            self._step_end = max(self._step_end + step_ms(step, read) * self._s_per_ms, now)
            self._stepping = self._loop.call_later(self._step_end - now, self._end_step)
        else:
            self._stepping = self._loop.call_soon(self._end_step)

    def _end_step(self) -> None:
        if self._faults.frozen:
            return
        self.scheduler.complete(self._emit)
        if self._listener is not None and (events := self.scheduler.cache.take_events()):
            self._listener(self.number, events)
        self._step()

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            len(scheduler.running),
            scheduler.idle,
            scheduler.cache.usage,
            scheduler.prefix_queries,
            scheduler.prefix_hits,
        )

"""The mock engine on an event loop: one callback for each step of each rank, none when there is nothing to do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from dynamo.errors import ContextLengthError, EngineError, RequestError
from dynamo.kv.hashing import block_hashes
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener
from dynamo.llm.engines.mock.choice import Choice, Generation, Vocabulary, packed, vocabulary
from dynamo.llm.engines.mock.faults import Faults
from dynamo.llm.engines.mock.kv_cache import KvCache
from dynamo.llm.engines.mock.scheduler import Scheduler
from dynamo.llm.engines.mock.settings import MockSettings, mock_settings
from dynamo.llm.engines.mock.timing import step_ms
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.wire.stream import Channel, Stream

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

    async def start(self) -> EngineInfo:
        settings = self._settings
        self._progress("loading the tokenizer")
        self._vocabulary = vocabulary(self._model)
        if self._context < settings.max_model_len:
            log.warning("max-model-len %d is more than fits: %d tokens", settings.max_model_len, self._context)
        self._ranks = [Rank(number, settings, self._faults, self._listener) for number in range(self._count)]
        return EngineInfo(self._context, settings.block_size, settings.num_gpu_blocks_override, self._count)

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

    def _begin(self, request: GenerateRequest, channel: Channel[Delta]) -> None:
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
        generation = Generation(request, channel, rank.scheduler, self._live.discard)
        for index in range(sampling.n):
            generation.choices.append(Choice(generation, index, names, seen, limit, self._vocabulary))
        self._faults.choose(generation.choices[0])
        self._live.add(generation)
        channel.on_cancel = generation.withdraw
        rank.add(generation.choices)

    async def prefill(self, request: GenerateRequest) -> dict[str, Any]:
        raise EngineError("this engine does not compute KV for others")

    async def abort(self, request_id: str) -> None:
        for generation in [g for g in self._live if g.request.request_id == request_id]:
            generation.channel.cancel()

    def stats(self) -> list[EngineStats]:
        return [rank.stats() for rank in self._ranks]

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
            rank.stop()
        for generation in list(self._live):
            generation.end(EngineError("the engine is stopping"))


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

    def __len__(self) -> int:
        return len(self.scheduler)

    def add(self, choices: list[Choice]) -> None:
        for choice in choices:
            self.scheduler.add(choice)
        if self._stepping is None:  # requests of one turn of the loop share the first step
            self._step_end = time.monotonic()
            self._stepping = self._loop.call_soon(self._step)

    def stop(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()

    def _step(self) -> None:
        step = self.scheduler.schedule()
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
            len(scheduler.waiting),
            scheduler.cache.usage,
            scheduler.prefix_queries,
            scheduler.prefix_hits,
        )

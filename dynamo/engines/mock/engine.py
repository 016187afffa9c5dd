"""`MockEngine`: the `dynamo.llm.engine.Engine` without a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from dynamo.engines.mock.faults import Faults
from dynamo.engines.mock.generation import Generation, MockSequence
from dynamo.engines.mock.rank import MockRank
from dynamo.engines.mock.settings import MockSettings, mock_settings
from dynamo.engines.mock.transfer import KvLeaseServer, KvSource
from dynamo.engines.mock.vocabulary import Token, load_vocabulary, pack_tokens
from dynamo.errors import ContextLengthError, EngineDeadError, EngineError, RequestError
from dynamo.kv_router.hashing import block_hashes
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener, KvTransfers
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.streams import Channel, Stream

log = logging.getLogger(__name__)


class MockEngine:
    """An engine with the settings of `MockSettings`.

    A request goes to the rank that it names, else to the rank with the fewest sequences. Methods: see `Engine`.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> None:
        """Raise StartError for an argument of a wrong type or range."""
        self._model = model
        self._settings = mock_settings(arguments)
        self._progress = progress
        self._context_length = min(self._settings.max_model_len, *_capacities(self._settings))
        self._faults = Faults(self._settings)
        self._running: set[Generation] = set()
        self._vocabulary: list[Token] = []
        self._ranks: list[MockRank] = []
        self._listener: KvListener | None = None
        self._leases = KvLeaseServer(self._settings.kv_transfer_lease_s)

    async def start(self) -> EngineInfo:
        settings = self._settings
        self._progress("loading the tokenizer")
        self._vocabulary = load_vocabulary(self._model)
        if self._context_length < settings.max_model_len:
            log.warning(
                "max-model-len reduced from %d to the %d tokens that fit", settings.max_model_len, self._context_length
            )
        ranks = range(settings.data_parallel_size)
        self._ranks = [MockRank(number, settings, self._faults, self._listener) for number in ranks]
        return EngineInfo(
            context_length=self._context_length,
            kv_block_size=settings.block_size,
            kv_blocks=settings.num_gpu_blocks_override,
            ranks=len(ranks),
            slots=settings.max_num_seqs,
        )

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        channel: Channel[Delta] = Channel()
        stream = Stream(channel)
        try:
            self._begin(request, channel)
        except RequestError as error:
            channel.end(error)
        return stream

    def _begin(
        self, request: GenerateRequest, channel: Channel[Delta], keep: Callable[[MockSequence], None] | None = None
    ) -> None:
        """Start a request whose deltas go to `channel`. Raises RequestError if it is invalid or does not fit."""
        prompt = request.token_ids
        room = self._context_length - len(prompt)
        self._validate(request, room)
        caching = self._settings.enable_prefix_caching
        try:
            packed = pack_tokens(prompt)
            hashes = block_hashes(prompt, self._settings.block_size) if caching else []
        except OverflowError:
            raise RequestError("a prompt token is not a number of 32 bits") from None
        source = self._kv_source(request)
        rank = min(self._ranks, key=MockRank.__len__) if request.rank is None else self._ranks[request.rank]
        generation = Generation(request, channel, rank.scheduler, self._running.discard)
        generation.keep = keep
        limit = min(room, request.sampling.max_tokens or room)
        for index in range(request.sampling.n):
            sequence = MockSequence(generation, index, hashes, packed, limit, self._vocabulary)
            sequence.source = source
            sequence.fetches = source is not None
            generation.sequences.append(sequence)
        self._faults.plan_error(generation.sequences[0])
        self._running.add(generation)

        def withdraw() -> None:
            generation.withdraw()
            rank.wake()

        channel.on_cancel = withdraw
        rank.add(generation.sequences)

    def _validate(self, request: GenerateRequest, room: int) -> None:
        """Raise RequestError for a request that the engine cannot run; `room` is the number of tokens left for output."""
        prompt = request.token_ids
        ranks = len(self._ranks)
        if request.sampling.logprobs is not None:
            raise RequestError("the mock engine does not support logprobs", param="logprobs")
        if not prompt:
            raise RequestError("the prompt has no tokens")
        if room < 1:
            raise ContextLengthError(f"{len(prompt)} prompt tokens do not fit {self._context_length}")
        if request.rank is not None and not 0 <= request.rank < ranks:
            raise RequestError(f"rank {request.rank}: the engine has {ranks}", param="rank")

    def _kv_source(self, request: GenerateRequest) -> KvSource | None:
        """Return where to fetch the prompt's KV; None: compute it here."""
        if request.kv_transfer is None or not self._settings.kv_transfer or request.sampling.n > 1:
            return None
        try:
            return msgspec.convert(request.kv_transfer, KvSource)
        except msgspec.ValidationError as error:
            raise RequestError(f"kv_transfer is not of the mock engine: {error}", param="kv_transfer") from None

    async def prefill(self, request: GenerateRequest) -> dict[str, Any]:
        if not self._settings.kv_transfer:
            raise EngineError("this engine does not compute KV for others", hint="start it with kv-transfer: true")
        await self._leases.open()
        name = os.urandom(8).hex()

        def keep(sequence: MockSequence) -> None:
            rank = next(rank for rank in self._ranks if rank.scheduler is sequence.generation.scheduler)
            rank.scheduler.keep(sequence)
            self._leases.lease(name, lambda: rank.free(sequence))

        channel: Channel[Delta] = Channel()
        stream = Stream(channel)
        sampling = Sampling(max_tokens=1, ignore_eos=True, seed=request.sampling.seed)
        self._begin(msgspec.structs.replace(request, sampling=sampling, kv_transfer=None), channel, keep)
        try:
            deltas = [delta async for delta in stream]
        except BaseException:
            self._leases.release(name)
            raise
        return self._leases.source(name, deltas[0].cached_tokens or 0)

    async def abort(self, request_id: str) -> None:
        for generation in [g for g in self._running if g.request.request_id == request_id]:
            generation.channel.cancel()

    def stats(self) -> list[EngineStats]:
        return [rank.stats() for rank in self._ranks]

    def kv_transfers(self) -> KvTransfers | None:
        if not self._settings.kv_transfer:
            return None
        total = KvTransfers(expired=self._leases.expired)
        for rank in self._ranks:
            total = total.plus(rank.transfers)
        return total

    def kv_events(self, listener: KvListener) -> bool:
        if not self._settings.enable_prefix_caching:
            return False
        self._listener = listener
        return True

    async def check_health(self) -> None:
        self._faults.check()

    async def stop(self) -> None:
        """Stop all ranks; running requests end with EngineDeadError."""
        for rank in self._ranks:
            await rank.stop()
        for generation in list(self._running):
            generation.end(EngineDeadError("the engine is stopping"))
        await self._leases.close()


def _capacities(settings: MockSettings) -> list[int]:
    """Return the tokens of the longest sequence that can run alone: by the KV blocks, and by the step without chunks."""
    by_blocks = (settings.num_gpu_blocks_override - 1) * settings.block_size
    return [by_blocks] if settings.enable_chunked_prefill else [by_blocks, settings.max_num_batched_tokens]

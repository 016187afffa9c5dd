"""What a worker tells others while it serves: the blocks in its KV caches, and its load."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from dynamo.errors import DynamoError
from dynamo.kv_router.block_map import BlockMap
from dynamo.kv_router.events import Change, EngineEvent, KvEvents, KvSnapshot, WorkerLoad
from dynamo.kv_router.hashing import block_hashes, pack
from dynamo.llm.engine import Engine, EngineInfo
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.streams import Channel, Stream

log = logging.getLogger(__name__)

M = TypeVar("M", KvEvents, WorkerLoad)
Publish = Callable[[M], Awaitable[None]]

KV_EVERY_S = 0.005
LOAD_EVERY_S = 0.010
LOAD_AT_LEAST_EVERY_S = 1.0
PUBLISH_TIMEOUT_S = 1.0
HASH_BYTES = 8
MESSAGE_HASHES = 32_768
"""of one KvEvents: 256 KiB, where NATS takes 1 MiB"""
SNAPSHOT_HASHES = 65_536
"""of one part of a snapshot"""


class _Request:
    """One that is accepted and not finished. Lengths in tokens; `generated` is of all its choices."""

    __slots__ = ("generated", "prompt", "request")

    def __init__(self, request: GenerateRequest) -> None:
        self.request, self.prompt, self.generated = request, len(request.token_ids), 0

    @property
    def to_prefill(self) -> int:
        """Tokens of the prompt that this worker has still to compute."""
        return 0 if self.generated else max(self.prompt - self.request.expected_hit, 0)


class _Rank:
    """One data-parallel engine."""

    def __init__(self, number: int, block_size: int) -> None:
        self.number = number
        self.ledger = BlockMap(block_size)
        self.sequence = 0  # of the last message made
        self.outbox: deque[KvEvents] = deque()
        self.requests: set[_Request] = set()
        self.accepted: list[str] = []
        self.changed = False  # its load, since it was last told
        self.told_at = 0.0


class WorkerReporter:
    """Stands before a started engine, follows its requests and its KV events, and publishes both once `start` is called.

    What cannot be published is dropped: a subscriber sees the gap in `KvEvents.sequence` and asks for a snapshot, and
    the next `WorkerLoad` replaces the one that was lost.
    """

    def __init__(
        self,
        worker: int,
        engine: Engine,
        info: EngineInfo,
        *,
        kv_events: bool,
        publish_kv: Publish[KvEvents],
        publish_load: Publish[WorkerLoad],
        generate: Callable[[GenerateRequest], Stream[Delta]] | None = None,
    ) -> None:
        """`generate` stands before the engine's own; it may change `expected_hit` of a request while that runs."""
        self._worker, self._engine, self._info, self._kv_events = worker, engine, info, kv_events
        self._generate = generate or engine.generate
        self._publish_kv, self._publish_load = publish_kv, publish_load
        self._ranks = [_Rank(number, info.kv_block_size) for number in range(info.ranks)]
        self._kv_changed, self._load_changed = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._load_changed.set()  # the first time at once
        self._tasks.append(loop.create_task(self._tell_load()))
        if self._kv_events:
            self._tasks.append(loop.create_task(self._tell_kv()))

    async def stop(self) -> None:
        """Publishes nothing more. May be called without `start`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- requests

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        """What the engine gives. Of several ranks, one is chosen here when the request names none, so that it is known."""
        if request.rank is None and len(self._ranks) > 1:
            request.rank = min(self._ranks, key=lambda rank: len(rank.requests)).number
        stream = self._generate(request)
        number = request.rank or 0
        if not 0 <= number < len(self._ranks):
            return stream  # an error
        return self._follow(self._ranks[number], request, stream)

    def _follow(self, rank: _Rank, request: GenerateRequest, stream: Stream[Delta]) -> Stream[Delta]:
        followed = _Request(request)
        rank.requests.add(followed)
        if request.request_id:
            rank.accepted.append(request.request_id)
        self._load_changes(rank)

        def cancel() -> None:
            finish()
            stream.cancel()

        out: Channel[Delta] = Channel(on_cancel=cancel, on_consumed=stream.consumed)
        push = out.push

        def take(delta: Delta) -> None:  # for every token of every stream: no more than it must
            if not followed.generated:
                self._load_changes(rank)
            followed.generated += len(delta.token_ids)
            push(delta)

        def finish() -> None:
            rank.requests.discard(followed)
            self._load_changes(rank)

        def end(error: BaseException | None) -> None:
            finish()
            out.end(error)

        stream.pipe(take, end, counted=False)
        return Stream(out)

    def hit(self, request: GenerateRequest) -> int:
        """Prompt tokens in the prefix cache: what the engine has told of it, else what the router expects."""
        number, size = request.rank or 0, self._info.kv_block_size
        if not self._kv_events or not 0 <= number < len(self._ranks):
            return request.expected_hit
        return self._ranks[number].ledger.overlap(block_hashes(request.token_ids, size)) * size

    # -- load

    def _load_changes(self, rank: _Rank) -> None:
        rank.changed = True
        self._load_changed.set()

    def load(self, number: int) -> WorkerLoad:
        """The load of a rank now; `accepted` names the requests since the last call."""
        rank, info, size = self._ranks[number], self._info, self._info.kv_block_size
        stats = self._engine.stats()[number]
        accepted, rank.accepted = rank.accepted, []
        return WorkerLoad(
            worker=self._worker,
            rank=number,
            running=stats.running,
            waiting=stats.waiting,
            prefill_blocks=sum(_blocks(r.to_prefill, size) for r in rank.requests),
            decode_blocks=sum(_blocks(r.prompt + r.generated, size) for r in rank.requests),
            kv_blocks=info.kv_blocks,
            kv_usage=stats.kv_usage,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            accepted=accepted,
            kv_sequence=rank.sequence,
            kv_block_size=size,
            kv_events=self._kv_events,
        )

    async def _tell_load(self) -> None:
        while True:
            try:
                async with asyncio.timeout(LOAD_AT_LEAST_EVERY_S):
                    await self._load_changed.wait()
            except TimeoutError:
                pass
            self._load_changed.clear()
            now = time.monotonic()
            for rank in self._ranks:
                if rank.changed or now - rank.told_at >= LOAD_AT_LEAST_EVERY_S:
                    rank.changed, rank.told_at = False, now
                    await _send(self._publish_load, self.load(rank.number))
            await asyncio.sleep(LOAD_EVERY_S)

    # -- KV blocks

    def take_events(self, number: int, events: Sequence[EngineEvent]) -> None:
        """The engine's listener."""
        self._ranks[number].ledger.apply(events)
        self._kv_changed.set()

    def snapshot(self) -> Stream[KvSnapshot]:
        """All blocks of all ranks as of now; what changed up to here is in messages up to the snapshot's `sequence`."""
        channel: Channel[KvSnapshot] = Channel()
        for rank in self._ranks:
            self._cut(rank)
            hashes, part_bytes = pack(rank.ledger.blocks()), SNAPSHOT_HASHES * HASH_BYTES
            for start in range(0, len(hashes) or 1, part_bytes):
                part, last = hashes[start : start + part_bytes], start + part_bytes >= len(hashes)
                channel.push(
                    KvSnapshot(self._worker, rank.number, rank.sequence, self._info.kv_block_size, part, last=last)
                )
        channel.end()
        return Stream(channel)

    async def _tell_kv(self) -> None:
        while True:
            await self._kv_changed.wait()
            self._kv_changed.clear()
            for rank in self._ranks:
                self._cut(rank)
                while rank.outbox:
                    if not await _send(self._publish_kv, rank.outbox.popleft()):
                        rank.outbox.clear()  # subscribers must ask for a snapshot in any case
            await asyncio.sleep(KV_EVERY_S)

    def _cut(self, rank: _Rank) -> None:
        """Make messages of what has changed since the last call: from here on `sequence` stands for it."""
        for changes in _messages(rank.ledger.changes()):
            rank.sequence += 1
            rank.outbox.append(KvEvents(self._worker, rank.number, rank.sequence, changes))


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _messages(changes: Sequence[Change]) -> Iterator[list[Change]]:
    """Cut into lists of at most MESSAGE_HASHES hashes."""
    message: list[Change] = []
    room_bytes = full_bytes = MESSAGE_HASHES * HASH_BYTES
    for change in changes:
        start = 0
        while start < len(change.hashes):
            part = change.hashes[start : start + room_bytes]
            message.append(Change(change.stored, part))
            start, room_bytes = start + len(part), room_bytes - len(part)
            if not room_bytes:
                yield message
                message, room_bytes = [], full_bytes
    if message:
        yield message


async def _send(publish: Publish[M], message: M) -> bool:
    """False when it did not leave: without NATS a worker goes on."""
    try:
        async with asyncio.timeout(PUBLISH_TIMEOUT_S):
            await publish(message)
    except (DynamoError, TimeoutError) as error:
        log.debug("%s not published: %s", type(message).__name__, error)
        return False
    except Exception:
        log.exception("%s not published", type(message).__name__)
        return False
    return True

"""A worker's reports to routers while it serves: the blocks in its KV caches, and its load."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from dynamo.errors import DynamoError
from dynamo.kv_router.block_map import BlockMap
from dynamo.kv_router.events import Change, KvEvents, KvSnapshot, WorkerLoad
from dynamo.kv_router.hashing import pack
from dynamo.llm.cached_blocks import CachedBlocks
from dynamo.llm.engine import Engine, EngineInfo, Generate
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.streams import Channel, Stream
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)

KV_INTERVAL_S = 0.005
"""shortest time between two messages about KV blocks"""
LOAD_INTERVAL_S = 0.010
"""shortest time between two messages about the load"""
LOAD_MAX_INTERVAL_S = 1.0
"""longest time between them"""
PUBLISH_TIMEOUT_S = 1.0
HASH_BYTES = 8
MESSAGE_HASHES = 32_768
"""of one KvEvents: 256 KiB, where NATS accepts 1 MiB"""
SNAPSHOT_HASHES = 65_536
"""of one part of a snapshot"""

M_contra = TypeVar("M_contra", contravariant=True)


class Publisher(Protocol[M_contra]):
    """A topic of the worker."""

    async def publish(self, message: M_contra) -> None: ...


class _ActiveRequest:
    """A request that has been accepted and has not ended."""

    __slots__ = ("generated", "prompt", "request")

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.prompt = len(request.token_ids)
        self.generated = 0  # tokens of all its choices

    @property
    def to_prefill(self) -> int:
        """Prompt tokens that this worker has yet to compute; `expected_hit` may change while the request runs."""
        return 0 if self.generated else max(self.prompt - self.request.expected_hit, 0)


class _RankState:
    """One data-parallel rank: its requests, and the state of its messages."""

    def __init__(self, number: int, blocks: BlockMap) -> None:
        self.number = number
        self.blocks = blocks
        self.sequence = 0  # of the last KvEvents made
        self.unsent: deque[KvEvents] = deque()
        self.requests: set[_ActiveRequest] = set()
        self.accepted: list[str] = []  # request ids since the last WorkerLoad
        self.load_changed = False  # since the last WorkerLoad
        self.load_published_s = 0.0


class WorkerReporter:
    """A `generate` that follows each request, and publishes the worker's load and its KV blocks after `start`.

    Messages that cannot be published are dropped: a subscriber sees the gap in `KvEvents.sequence` and requests a
    snapshot, and the next `WorkerLoad` replaces the one that was lost.
    """

    def __init__(
        self,
        generate: Generate,
        *,
        engine: Engine,
        info: EngineInfo,
        instance_id: int,
        cached_blocks: CachedBlocks,
        kv_events: Publisher[KvEvents],
        load: Publisher[WorkerLoad],
    ) -> None:
        self._generate = generate
        self._engine = engine
        self._info = info
        self._instance_id = instance_id
        self._cached_blocks = cached_blocks
        self._kv_topic = kv_events
        self._load_topic = load
        self._ranks = [_RankState(number, blocks) for number, blocks in enumerate(cached_blocks.ranks)]
        self._load_changed = asyncio.Event()
        self._background = TaskSet("worker reporter")

    def start(self) -> None:
        """Begin to publish; the first load immediately."""
        self._load_changed.set()
        self._background.spawn(self._publish_load(), name="load")
        if self._cached_blocks.reported:
            self._background.spawn(self._publish_kv_events(), name="KV events")

    async def stop(self) -> None:
        """Stop publishing; no-op without `start`."""
        await self._background.aclose()

    # -- requests

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        """Return the deltas of a request.

        With several ranks, `request.rank` is set to the rank with the fewest requests where it is None.
        """
        if request.rank is None and len(self._ranks) > 1:
            request.rank = min(self._ranks, key=lambda rank: len(rank.requests)).number
        stream = self._generate(request)
        number = request.rank or 0
        if not 0 <= number < len(self._ranks):
            return stream  # it ends with the engine's RequestError
        return self._follow(self._ranks[number], request, stream)

    def _follow(self, rank: _RankState, request: GenerateRequest, stream: Stream[Delta]) -> Stream[Delta]:
        active = _ActiveRequest(request)
        rank.requests.add(active)
        if request.request_id:
            rank.accepted.append(request.request_id)
        self._mark_load(rank)

        def on_cancel() -> None:
            forget()
            stream.cancel()

        out: Channel[Delta] = Channel(on_cancel=on_cancel, on_consumed=stream.consumed)
        push = out.push

        def on_delta(delta: Delta) -> None:  # runs for each token of each stream, so it does no more than it must
            if not active.generated:
                self._mark_load(rank)
            active.generated += len(delta.token_ids)
            push(delta)

        def on_end(error: BaseException | None) -> None:
            forget()
            out.end(error)

        def forget() -> None:
            rank.requests.discard(active)
            self._mark_load(rank)

        stream.pipe(on_delta, on_end, counted=False)
        return Stream(out)

    # -- load

    def load(self, number: int) -> WorkerLoad:
        """Return the load of a rank now; `accepted` lists the requests since the last call."""
        rank = self._ranks[number]
        stats = self._engine.stats()[number]
        block_size = self._info.kv_block_size
        accepted = rank.accepted
        rank.accepted = []
        return WorkerLoad(
            worker=self._instance_id,
            rank=number,
            running=stats.running,
            waiting=stats.waiting,
            prefill_blocks=sum(_blocks(r.to_prefill, block_size) for r in rank.requests),
            decode_blocks=sum(_blocks(r.prompt + r.generated, block_size) for r in rank.requests),
            kv_blocks=self._info.kv_blocks,
            kv_usage=stats.kv_usage,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            accepted=accepted,
            kv_sequence=rank.sequence,
            kv_block_size=block_size,
            kv_events=self._cached_blocks.reported,
        )

    def _mark_load(self, rank: _RankState) -> None:
        """Mark the load of a rank as changed, to be published soon."""
        rank.load_changed = True
        self._load_changed.set()

    async def _publish_load(self) -> None:
        """Publish the load of each rank after changes, and at least every LOAD_MAX_INTERVAL_S."""
        while True:
            try:
                async with asyncio.timeout(LOAD_MAX_INTERVAL_S):
                    await self._load_changed.wait()
            except TimeoutError:
                pass
            self._load_changed.clear()
            now_s = time.monotonic()
            for rank in self._ranks:
                if rank.load_changed or now_s - rank.load_published_s >= LOAD_MAX_INTERVAL_S:
                    rank.load_changed = False
                    rank.load_published_s = now_s
                    await _publish(self._load_topic, self.load(rank.number))
            await asyncio.sleep(LOAD_INTERVAL_S)

    # -- KV blocks

    def snapshot(self) -> Stream[KvSnapshot]:
        """Return all blocks of all ranks as of now, as a stream of parts.

        Messages up to the snapshot's `sequence` are contained in it; later ones apply on top of it.
        """
        channel: Channel[KvSnapshot] = Channel()
        part_bytes = SNAPSHOT_HASHES * HASH_BYTES
        for rank in self._ranks:
            self._collect_changes(rank)
            hashes = pack(rank.blocks.blocks())
            for start in range(0, len(hashes) or 1, part_bytes):
                part = hashes[start : start + part_bytes]
                last = start + part_bytes >= len(hashes)
                channel.push(
                    KvSnapshot(self._instance_id, rank.number, rank.sequence, self._info.kv_block_size, part, last=last)
                )
        channel.end()
        return Stream(channel)

    async def _publish_kv_events(self) -> None:
        changed = self._cached_blocks.changed
        while True:
            await changed.wait()
            changed.clear()
            for rank in self._ranks:
                self._collect_changes(rank)
                while rank.unsent:
                    if not await _publish(self._kv_topic, rank.unsent.popleft()):
                        rank.unsent.clear()  # subscribers must request a snapshot in any case
            await asyncio.sleep(KV_INTERVAL_S)

    def _collect_changes(self, rank: _RankState) -> None:
        """Queue messages about the changes since the last call; `rank.sequence` then stands for the state of now."""
        for changes in _split(rank.blocks.changes()):
            rank.sequence += 1
            rank.unsent.append(KvEvents(self._instance_id, rank.number, rank.sequence, changes))


def _blocks(tokens: int, block_size: int) -> int:
    """Return the number of blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


def _split(changes: Sequence[Change]) -> Iterator[list[Change]]:
    """Split changes into lists of at most MESSAGE_HASHES hashes."""
    message: list[Change] = []
    message_bytes = MESSAGE_HASHES * HASH_BYTES
    room_bytes = message_bytes
    for change in changes:
        start = 0
        while start < len(change.hashes):
            part = change.hashes[start : start + room_bytes]
            message.append(Change(change.stored, part))
            start += len(part)
            room_bytes -= len(part)
            if not room_bytes:
                yield message
                message = []
                room_bytes = message_bytes
    if message:
        yield message


M = TypeVar("M")


async def _publish(topic: Publisher[M], message: M) -> bool:
    """Publish a message; return False, and log, if that fails: a worker continues without NATS."""
    try:
        async with asyncio.timeout(PUBLISH_TIMEOUT_S):
            await topic.publish(message)
    except (DynamoError, TimeoutError) as error:
        log.debug("%s not published: %s", type(message).__name__, error)
        return False
    except Exception:
        log.exception("%s not published", type(message).__name__)
        return False
    return True

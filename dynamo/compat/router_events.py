"""KV cache events in the form of ai-dynamo: JSON with an engine's block hashes and a hash of each block's own tokens.

A worker publishes them on `namespace.<namespace>.component.<component>.router_events`. A listener announces itself on
`...router_events_wanted` every few seconds, and gets the whole cache after its first announcement.
"""

from __future__ import annotations

import asyncio
import logging
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from xxhash import xxh3_64_intdigest

from dynamo.errors import TransportError
from dynamo.kv_router.events import BlocksRemoved, BlocksStored, EngineEvent
from dynamo.tasks import TaskSet

log = logging.getLogger(__name__)

TOPIC = "router_events"
WANTED_TOPIC = "router_events_wanted"
WANTED_INTERVAL_S = 2.0
"""How often a listener announces itself."""
WANTED_FOR_S = 10.0
"""How long after an announcement a worker that publishes on demand goes on."""
TOKENS_SEED = 1337
MESSAGE_BLOCKS = 4096
"""of one event: about 250 KiB, where NATS accepts 1 MiB"""
_64_BITS = (1 << 64) - 1


class StoredBlock(msgspec.Struct, gc=False):
    block_hash: int
    """the engine's own"""
    tokens_hash: int


class Stored(msgspec.Struct, gc=False):
    parent_hash: int | None
    """the engine's hash of the block before the first; None: the first begins a prompt"""
    blocks: list[StoredBlock]


class Removed(msgspec.Struct, gc=False):
    block_hashes: list[int]


class Change(msgspec.Struct, omit_defaults=True, gc=False):
    """Blocks that were stored or removed; one of both is set."""

    stored: Stored | None = None
    removed: Removed | None = None


class KvCacheEvent(msgspec.Struct, gc=False):
    event_id: int
    data: Change | Literal["cleared"]


class RouterEvent(msgspec.Struct, gc=False):
    worker_id: int
    event: KvCacheEvent


def topic_prefix(namespace: str, component: str) -> str:
    """Return what the NATS subjects of a component's topics begin with."""
    return f"namespace.{namespace}.component.{component}."


def token_hashes(tokens: Sequence[int], kv_block_size: int) -> list[int]:
    """Return a hash of the tokens of each full block, whatever is before it: xxh3 of 32-bit little-endian integers.

    They are those of ai-dynamo, for `RadixTree.find_matches` and `KvIndexer.find_matches`.
    """
    if kv_block_size <= 0:
        raise ValueError(f"kv_block_size: expected more than 0, found {kv_block_size}")
    packed = array("I", tokens).tobytes()
    size = 4 * kv_block_size
    return [xxh3_64_intdigest(packed[end - size : end], TOKENS_SEED) for end in range(size, len(packed) + 1, size)]


def stored_blocks(block_hashes: Iterable[int], tokens: Sequence[int], kv_block_size: int) -> list[StoredBlock]:
    """Return the blocks of consecutive tokens; an engine's hash that is negative or longer is cut to 64 bits."""
    pairs = zip(block_hashes, token_hashes(tokens, kv_block_size), strict=False)
    return [StoredBlock(block_hash & _64_BITS, tokens_hash) for block_hash, tokens_hash in pairs]


def events_of(changes: Sequence[EngineEvent], kv_block_size: int, event_id: int = 0) -> Iterator[KvCacheEvent]:
    """Yield an engine's events in this form; blocks of another size are left out."""
    for change in changes:
        if isinstance(change, BlocksStored):
            if change.block_size == kv_block_size:
                blocks = stored_blocks(change.hashes, change.token_ids, kv_block_size)
                yield stored_event(event_id, change.parent, blocks)
        elif isinstance(change, BlocksRemoved):
            yield removed_event(event_id, change.hashes)
        else:
            yield KvCacheEvent(event_id, "cleared")


def stored_event(event_id: int, parent: int | None, blocks: list[StoredBlock]) -> KvCacheEvent:
    """Return an event of blocks after `parent`, the engine's hash of a block."""
    parent_hash = None if parent is None else parent & _64_BITS
    return KvCacheEvent(event_id, Change(stored=Stored(parent_hash, blocks)))


def removed_event(event_id: int, block_hashes: Iterable[int]) -> KvCacheEvent:
    """Return an event of removed blocks, by the engine's hashes."""
    return KvCacheEvent(event_id, Change(removed=Removed([block_hash & _64_BITS for block_hash in block_hashes])))


class Connection(Protocol):
    """NATS, as the runtime of a process offers it."""

    async def send(self, subject: str, payload: bytes) -> None: ...

    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> Any: ...


class _Block(NamedTuple):
    parent_hash: int | None
    tokens_hash: int


class CachePublisher:
    """Publishes the contents of one worker's KV cache, and knows them. For use on the event loop, after `start`.

    With `on_demand` it sends only while a listener announces itself, and begins to know the cache at the first
    announcement: blocks stored before are left out, with those after them. Events lost with the connection to NATS are
    made up for by the whole cache.
    """

    def __init__(
        self, connection: Connection, namespace: str, component: str, worker_id: int, *, on_demand: bool = False
    ) -> None:
        self._connection = connection
        self._prefix = topic_prefix(namespace, component)
        self._worker_id = worker_id
        self._loop = asyncio.get_running_loop()
        self._follows_cache = not on_demand
        self._wanted_until_s = 0.0 if on_demand else math.inf
        self._listeners: deque[bytes] = deque(maxlen=256)  # that have the whole cache
        self._blocks: dict[int, _Block] = {}  # by the engine's hash
        self._extra_copies: dict[int, int] = {}  # by the engine's hash, copies beyond the first
        self._unsent: deque[KvCacheEvent | None] = deque()  # None: the whole cache
        self._incomplete = False  # events were lost
        self._sending = False
        self._tasks = TaskSet("router events")

    async def start(self) -> None:
        """Begin to follow who listens. Raises TransportError."""
        await self._connection.listen(self._prefix + WANTED_TOPIC, self._on_wanted)

    async def close(self) -> None:
        """Stop publishing."""
        await self._tasks.aclose()

    def publish_changes(self, changes: Sequence[EngineEvent], kv_block_size: int) -> None:
        """Publish an engine's events. A block that it stored twice stays until it is removed twice, as in vLLM."""
        if not self._follows_cache:
            return
        for event in events_of(changes, kv_block_size):
            if isinstance(event.data, Change) and event.data.stored is not None:
                for block in event.data.stored.blocks:
                    if block.block_hash in self._blocks:
                        self._extra_copies[block.block_hash] = self._extra_copies.get(block.block_hash, 0) + 1
            elif isinstance(event.data, Change) and event.data.removed is not None:
                hashes = event.data.removed.block_hashes
                hashes[:] = [block_hash for block_hash in hashes if not self._remove_copy(block_hash)]
                if not hashes:
                    continue
            self.publish(event)

    def _remove_copy(self, block_hash: int) -> bool:
        """Remove a copy beyond the first; return False if there is none."""
        copies = self._extra_copies.pop(block_hash, 0)
        if copies > 1:
            self._extra_copies[block_hash] = copies - 1
        return copies > 0

    def publish(self, event: KvCacheEvent) -> None:
        """Publish an event; one that stores blocks after an unknown one is dropped."""
        if event.data == "cleared":
            self._blocks.clear()
            self._extra_copies.clear()
        elif (removed := event.data.removed) is not None:
            for block_hash in removed.block_hashes:
                self._blocks.pop(block_hash, None)
        elif (stored := event.data.stored) is not None:
            parent_hash = stored.parent_hash
            if parent_hash is not None and parent_hash not in self._blocks:
                log.debug("blocks not published, the one before them is unknown: %x", parent_hash)
                return
            for block in stored.blocks:
                self._blocks[block.block_hash] = _Block(parent_hash, block.tokens_hash)
                parent_hash = block.block_hash
        if self._loop.time() < self._wanted_until_s:
            self._queue(event)

    def _queue(self, event: KvCacheEvent | None) -> None:
        self._unsent.append(event)
        if not self._sending:
            self._sending = True
            self._tasks.spawn(self._send_queued(), name="send")

    async def _send_queued(self) -> None:
        try:
            while self._unsent:
                event = self._unsent.popleft()
                try:
                    if event is None or self._incomplete:
                        await self._send_all()
                    else:
                        for part in _parts(event):
                            await self._send(part)
                except TransportError as error:
                    log.debug("KV events not published: %s", error.message)
                    self._incomplete = True
                    self._unsent.clear()
        finally:
            self._sending = False

    async def _send(self, event: KvCacheEvent) -> None:
        await self._connection.send(self._prefix + TOPIC, msgspec.json.encode(RouterEvent(self._worker_id, event)))

    async def _send_all(self) -> None:
        """Send the whole cache. Events in the queue that it contains already change nothing when they follow."""
        await self._send(KvCacheEvent(0, "cleared"))
        run: list[StoredBlock] = []
        start: int | None = None  # the parent of the first block of the run
        for block_hash, block in list(self._blocks.items()):  # a block stands after the one before it in the prompt
            if run and (block.parent_hash != run[-1].block_hash or len(run) == MESSAGE_BLOCKS):
                await self._send(stored_event(0, start, run))
                await asyncio.sleep(0)  # requests go on, and the connection writes, during a large cache
                run = []
            if not run:
                start = block.parent_hash
            run.append(StoredBlock(block_hash, block.tokens_hash))
        if run:
            await self._send(stored_event(0, start, run))
        self._incomplete = False

    def _on_wanted(self, listener: bytes) -> None:
        self._follows_cache = True
        now_s = self._loop.time()
        if now_s >= self._wanted_until_s:
            self._listeners.clear()  # events were not sent meanwhile
        self._wanted_until_s = max(self._wanted_until_s, now_s + WANTED_FOR_S)
        if listener not in self._listeners:
            self._listeners.append(listener)
            if None not in self._unsent:
                self._queue(None)


def _parts(event: KvCacheEvent) -> Iterator[KvCacheEvent]:
    """Split an event that stores many blocks."""
    stored = event.data.stored if isinstance(event.data, Change) else None
    if stored is None or len(stored.blocks) <= MESSAGE_BLOCKS:
        yield event
        return
    parent_hash = stored.parent_hash
    for start in range(0, len(stored.blocks), MESSAGE_BLOCKS):
        blocks = stored.blocks[start : start + MESSAGE_BLOCKS]
        yield stored_event(event.event_id, parent_hash, blocks)
        parent_hash = blocks[-1].block_hash

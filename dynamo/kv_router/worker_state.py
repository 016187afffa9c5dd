"""`WorkerState`: what the workers' messages say of their KV caches and their load, kept right through losses and restarts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from dynamo.kv_router.approximate_index import ApproximateIndex
from dynamo.kv_router.cost import Loads
from dynamo.kv_router.events import KvEvents, KvSnapshot, WorkerLoad
from dynamo.kv_router.hashing import unpack
from dynamo.kv_router.index import PrefixIndex, slots
from dynamo.kv_router.pending_prefixes import PendingPrefixes

log = logging.getLogger(__name__)

MAX_HELD = 10_000
"""Event messages kept while a snapshot is under way; with more, another one follows."""
PENDING_S = 5.0
"""How long a placed request counts that its worker has not reported: the caller may have died in between."""
SILENT_REQUESTS, SILENT_S = 8, 10.0
"""After so many requests and so long without a single event, a cache is held for one that tells none."""


class Cache:
    """One engine's cache. `sequence` is that of the last events applied, None while a snapshot is awaited; `held` are
    the messages that came meanwhile; `owed` is the last sequence that the worker said it has sent; `ranks` are all of
    the worker's caches, by rank."""

    __slots__ = (
        "held", "load", "owed", "pending", "rank", "ranks", "sequence", "silent_requests", "silent_since_s", "slot",
        "worker",
    )  # fmt: skip

    def __init__(self, worker: int, rank: int, slot: int, ranks: dict[int, Cache]) -> None:
        self.worker, self.rank, self.slot, self.ranks = worker, rank, slot, ranks
        self.sequence: int | None = None
        self.held: list[KvEvents] = []
        self.owed = 0
        self.load: WorkerLoad | None = None
        self.pending: dict[str, tuple[int, int, float]] = {}  # new blocks, blocks, until when
        self.silent_requests, self.silent_since_s = 0, 0.0


class WorkerState:
    """Workers `join` and `leave`. Their messages are handed to `take_...`, which return True when a snapshot of the
    worker is needed. `alive` and `blind` are bits by slot; blind: not told what it holds. A free slot keeps the cache
    that it had.
    """

    def __init__(self, loads: Loads) -> None:
        self.index, self.routed, self.loads = PrefixIndex(), ApproximateIndex(), loads
        self.expected = PendingPrefixes(self.index)
        self.alive = self.blind = 0
        self.block_size = 0
        self.events = self.resyncs = 0
        self._said: set[str] = set()
        self.slots: list[Cache] = []
        self._ranks: dict[int, dict[int, Cache]] = {}

    @property
    def workers(self) -> list[int]:
        return list(self._ranks)

    def all(self) -> list[Cache]:
        return [self.slots[slot] for slot in slots(self.alive)]

    def of(self, worker: int) -> list[Cache]:
        return list(self._ranks.get(worker, {}).values())

    def join(self, worker: int) -> None:
        """A snapshot should follow: `take_snapshot`, or `is_blind` when the worker gives none."""
        if worker not in self._ranks:
            self._ranks[worker] = {}
            self._find(worker, 0)

    def leave(self, worker: int) -> None:
        for cache in self._ranks.pop(worker, {}).values():
            slot = cache.slot
            self.loads.set(slot, math.inf, math.inf)
            self.alive, self.blind = self.alive & ~(1 << slot), self.blind & ~(1 << slot)
            self.index.drop(slot)
            self.routed.drop(slot)
            self.expected.drop(slot)

    def _find(self, worker: int, rank: int) -> Cache | None:
        """None for a worker that has left, or has not joined yet: its snapshot will tell."""
        ranks = self._ranks.get(worker)
        if ranks is None:
            return None
        found = ranks.get(rank)
        if found is None:
            slot = (~self.alive & (self.alive + 1)).bit_length() - 1  # the first that is free
            found = ranks[rank] = Cache(worker, rank, slot, ranks)
            self.slots[slot : slot + 1] = [found]
            self.alive |= 1 << slot
            self.loads.set(slot, 0.0, 0.0)
        return found

    def is_blind(self, worker: int, reason: str) -> None:
        """What its caches hold is not told, so what was sent there is used instead. Said once for each reason."""
        for cache in self.of(worker):
            self.blind |= 1 << cache.slot
        if reason not in self._said:
            self._said.add(reason)
            log.warning("requests are routed by what was sent where (approx-kv): worker %x: %s", worker, reason)

    def take_events(self, message: KvEvents) -> bool:
        cache = self._find(message.worker, message.rank)
        if cache is None:
            return False
        if cache.sequence is None:
            if len(cache.held) < MAX_HELD:
                cache.held.append(message)
            return False
        if message.sequence <= cache.sequence:
            return False
        if message.sequence > cache.sequence + 1:
            self._lost(cache, message)
            return True
        cache.sequence = message.sequence
        self.blind &= ~(1 << cache.slot)
        for change in message.changes:
            hashes = unpack(change.hashes)
            self.events += len(hashes)
            if change.stored:
                self.index.add(cache.slot, hashes)
                self.expected.follow(cache.slot)
            else:
                self.index.remove(cache.slot, hashes)
        return False

    def _lost(self, cache: Cache, *held: KvEvents) -> None:
        self.resyncs += 1
        cache.sequence, cache.held = None, list(held)

    def take_snapshot(self, worker: int, parts: Sequence[KvSnapshot]) -> bool:
        """All parts of one snapshot."""
        again = False
        for rank in sorted({part.rank for part in parts}):
            cache = self._find(worker, rank)
            if cache is None or cache.sequence is not None:
                continue
            mine = [part for part in parts if part.rank == rank]
            self._set_block_size(mine[0].block_size)
            self.index.replace(cache.slot, [hash for part in mine for hash in unpack(part.hashes)])
            self.expected.follow(cache.slot)
            cache.sequence, cache.owed = mine[0].sequence, 0
            held, cache.held = cache.held, []
            for message in held:
                again |= self.take_events(message)
        return again

    def take_load(self, load: WorkerLoad) -> bool:
        cache = self._find(load.worker, load.rank)
        if cache is None:
            return False
        for request in load.accepted:
            cache.pending.pop(request, None)
        cache.load = load
        self._weigh(cache)
        self._set_block_size(load.kv_block_size)
        if not load.kv_events:
            self.is_blind(load.worker, "its engine tells no KV events")
        # the load before this one said that they were sent: they are not on their way any more
        lost = cache.sequence is not None and cache.sequence < cache.owed
        cache.owed = load.kv_sequence
        if lost:
            self._lost(cache)
        return lost

    def _set_block_size(self, size: int) -> None:
        if size and size != self.block_size:
            if self.block_size:
                log.warning(
                    "workers differ in block size (%d, %d): prefixes are not found on all", self.block_size, size
                )
            self.block_size = size

    def _weigh(self, cache: Cache) -> None:
        prefill = decode = 0
        if cache.load is not None:
            prefill, decode = cache.load.prefill_blocks, cache.load.decode_blocks
        for new_blocks, blocks, _ in cache.pending.values():
            prefill += new_blocks
            decode += blocks
        self.loads.set(cache.slot, prefill, decode)

    def place(self, cache: Cache, request_id: str, new_blocks: int, blocks: int, now_s: float) -> None:
        """A request was sent there: it counts until the worker reports it."""
        cache.pending[request_id] = (new_blocks, blocks, now_s + PENDING_S)
        self.loads.add(cache.slot, new_blocks, blocks)
        if new_blocks and not cache.sequence:  # told nothing so far
            if not cache.silent_requests:
                cache.silent_since_s = now_s
            cache.silent_requests += 1

    def tick(self, now_s: float) -> None:
        """Forget what is over."""
        self.routed.expire(now_s)
        self.expected.expire(now_s)
        for cache in self.all():
            late = [request for request, (_, _, until_s) in cache.pending.items() if until_s <= now_s]
            for request in late:
                del cache.pending[request]
            if late:
                self._weigh(cache)
            never = cache.sequence == 0 and cache.silent_requests >= SILENT_REQUESTS
            if never and now_s - cache.silent_since_s > SILENT_S:
                self.is_blind(cache.worker, f"no KV event came in {SILENT_S:.0f} s of requests")

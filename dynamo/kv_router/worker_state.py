"""`WorkerState`: the workers' KV caches and load as their messages report them, correct after losses and restarts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

from dynamo.kv_router.approximate_index import ApproximateIndex
from dynamo.kv_router.events import KvEvents, KvSnapshot, WorkerLoad
from dynamo.kv_router.hashing import BlockHash, unpack
from dynamo.kv_router.index import PrefixIndex
from dynamo.kv_router.pending_prefixes import PendingPrefixes

log = logging.getLogger(__name__)

MAX_BUFFERED = 10_000
"""Event messages kept while a snapshot is under way; if more arrive, another snapshot follows."""
UNREPORTED_S = 5.0
"""How long a placed request counts that its worker has not reported: the caller may have died in between."""
SILENT_REQUESTS = 8
SILENT_S = 10.0
"""After so many requests and so long without a single event, a cache counts as one without events."""


class Unreported(NamedTuple):
    """A request placed on a cache whose worker has not reported it yet."""

    new_blocks: int
    """prompt blocks to be computed"""
    blocks: int
    until_s: float


class CacheState:
    """The cache and the load of one engine: of a worker, or of one data-parallel rank of it."""

    __slots__ = (
        "announced_sequence", "buffered", "decode_blocks", "load", "prefill_blocks", "rank", "sequence",
        "silent_requests", "silent_since_s", "slot", "unreported", "worker",
    )  # fmt: skip

    def __init__(self, worker: int, rank: int, slot: int) -> None:
        self.worker = worker
        self.rank = rank
        self.slot = slot
        self.load: WorkerLoad | None = None
        self.prefill_blocks = 0.0  # of the last load, plus those of unreported requests
        self.decode_blocks = 0.0
        self.unreported: dict[str, Unreported] = {}  # by request id
        self.sequence: int | None = None  # of the last events applied; None while a snapshot is awaited
        self.buffered: list[KvEvents] = []  # events that arrived since the snapshot was requested
        self.announced_sequence = 0  # of the last events that the worker has sent, as its load says
        self.silent_requests = 0
        self.silent_since_s = 0.0

    def update_load(self) -> None:
        """Add up the reported load and the unreported requests."""
        self.prefill_blocks = float(self.load.prefill_blocks) if self.load is not None else 0.0
        self.decode_blocks = float(self.load.decode_blocks) if self.load is not None else 0.0
        for request in self.unreported.values():
            self.prefill_blocks += request.new_blocks
            self.decode_blocks += request.blocks


class WorkerState:
    """All workers that have joined, each with one cache or more.

    The `apply_...` methods take the workers' messages and return True when a new snapshot of the worker is needed.
    """

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.approximate = ApproximateIndex()
        self.pending = PendingPrefixes(self.index)
        self.without_events: set[int] = set()
        """slots of the caches whose contents are not reported: `approximate` is used for them"""
        self.block_size = 0
        """tokens in a KV block of the workers; 0: unknown"""
        self.event_blocks = 0
        """blocks in all events applied"""
        self.resyncs = 0
        self._logged_reasons: set[str] = set()
        self._by_slot: dict[int, CacheState] = {}
        self._by_worker: dict[int, dict[int, CacheState]] = {}  # by worker, by rank

    @property
    def workers(self) -> list[int]:
        return list(self._by_worker)

    @property
    def caches(self) -> list[CacheState]:
        return list(self._by_slot.values())

    def rank_count(self, worker: int) -> int:
        return len(self._by_worker[worker])

    def caches_of(self, worker: int) -> list[CacheState]:
        return list(self._by_worker.get(worker, {}).values())

    def join(self, worker: int) -> None:
        """Add a worker. Its snapshot should follow, or `mark_without_events` if it can give none."""
        if worker not in self._by_worker:
            self._by_worker[worker] = {}
            self._cache(worker, 0)

    def leave(self, worker: int) -> None:
        for cache in self._by_worker.pop(worker, {}).values():
            del self._by_slot[cache.slot]
            self.without_events.discard(cache.slot)
            self.index.drop(cache.slot)
            self.approximate.drop(cache.slot)
            self.pending.drop(cache.slot)

    def _cache(self, worker: int, rank: int) -> CacheState | None:
        """Return the cache of a rank, a new one if need be; None if the worker has left or not joined yet."""
        ranks = self._by_worker.get(worker)
        if ranks is None:
            return None
        if rank not in ranks:
            slot = next(slot for slot in itertools.count() if slot not in self._by_slot)
            self._by_slot[slot] = ranks[rank] = CacheState(worker, rank, slot)
        return ranks[rank]

    def overlaps(self, prompt: Sequence[BlockHash], *, approximate: bool, now_s: float) -> dict[int, int]:
        """Return by slot how many leading blocks of a prompt each cache holds or is about to hold; 0 may be left out.

        With `approximate` all caches count as caches without events.
        """
        if approximate:
            found = self.approximate.index.overlaps(prompt)
        else:
            found = self.index.overlaps(prompt)
            if self.without_events:
                estimates = self.approximate.index.overlaps(prompt)
                found.update({slot: estimates.get(slot, 0) for slot in self.without_events})
        if prompt and self.pending.prompts:
            self.pending.raise_overlaps(found, prompt, now_s)
        return found

    def mark_without_events(self, worker: int, reason: str) -> None:
        """Use the prompts sent to a worker's caches instead of KV events. Each reason is logged once."""
        self.without_events.update(cache.slot for cache in self.caches_of(worker))
        if reason not in self._logged_reasons:
            self._logged_reasons.add(reason)
            log.warning("falling back to routing history (approx-kv): worker %x: %s", worker, reason)

    def apply_events(self, message: KvEvents) -> bool:
        cache = self._cache(message.worker, message.rank)
        if cache is None:
            return False
        if cache.sequence is None:
            if len(cache.buffered) < MAX_BUFFERED:
                cache.buffered.append(message)
            return False
        if message.sequence <= cache.sequence:
            return False
        if message.sequence > cache.sequence + 1:
            self._resync(cache)
            cache.buffered.append(message)
            return True
        cache.sequence = message.sequence
        self.without_events.discard(cache.slot)
        for change in message.changes:
            hashes = unpack(change.hashes)
            self.event_blocks += len(hashes)
            if change.stored:
                self.index.add(cache.slot, hashes)
                self.pending.update(cache.slot)
            else:
                self.index.remove(cache.slot, hashes)
        return False

    def _resync(self, cache: CacheState) -> None:
        """Start to buffer events, until a snapshot has been applied."""
        self.resyncs += 1
        cache.sequence = None
        cache.buffered = []

    def apply_snapshot(self, worker: int, parts: Sequence[KvSnapshot]) -> bool:
        """Apply one snapshot, of which `parts` are all parts, then the events buffered meanwhile."""
        again = False
        for rank in sorted({part.rank for part in parts}):
            cache = self._cache(worker, rank)
            if cache is None or cache.sequence is not None:
                continue
            of_rank = [part for part in parts if part.rank == rank]
            self._set_block_size(of_rank[0].block_size)
            self.index.replace(cache.slot, [block for part in of_rank for block in unpack(part.hashes)])
            self.pending.update(cache.slot)
            cache.sequence = of_rank[0].sequence
            cache.announced_sequence = 0
            buffered = cache.buffered
            cache.buffered = []
            for message in buffered:
                again |= self.apply_events(message)
        return again

    def apply_load(self, load: WorkerLoad) -> bool:
        cache = self._cache(load.worker, load.rank)
        if cache is None:
            return False
        for request_id in load.accepted:
            cache.unreported.pop(request_id, None)
        cache.load = load
        cache.update_load()
        self._set_block_size(load.kv_block_size)
        if not load.kv_events:
            self.mark_without_events(load.worker, "its engine emits no KV events")
        # events that the load before this one announced are not on their way any more
        lost = cache.sequence is not None and cache.sequence < cache.announced_sequence
        cache.announced_sequence = load.kv_sequence
        if lost:
            self._resync(cache)
        return lost

    def _set_block_size(self, size: int) -> None:
        if size and size != self.block_size:
            if self.block_size:
                log.warning("workers differ in block size (%d, %d): prefix hits are missed", self.block_size, size)
            self.block_size = size

    def place(self, cache: CacheState, request_id: str, new_blocks: int, blocks: int, now_s: float) -> None:
        """Count a request of `blocks` prompt blocks, `new_blocks` of them to be computed, until the worker reports it."""
        cache.unreported[request_id] = Unreported(new_blocks, blocks, now_s + UNREPORTED_S)
        cache.prefill_blocks += new_blocks
        cache.decode_blocks += blocks
        if new_blocks and not cache.sequence:  # no event so far
            if not cache.silent_requests:
                cache.silent_since_s = now_s
            cache.silent_requests += 1

    def expire(self, now_s: float) -> None:
        """Remove what has expired, and mark caches whose events do not come."""
        self.approximate.expire(now_s)
        self.pending.expire(now_s)
        for cache in self.caches:
            expired = [id for id, request in cache.unreported.items() if request.until_s <= now_s]
            for request_id in expired:
                del cache.unreported[request_id]
            if expired:
                cache.update_load()
            silent = cache.sequence == 0 and cache.silent_requests >= SILENT_REQUESTS
            if silent and now_s - cache.silent_since_s > SILENT_S:
                self.mark_without_events(cache.worker, f"no KV event in {SILENT_S:.0f} s of requests")

"""`RadixTree`, `KvIndexer` and `ApproxKvIndexer` of ai-dynamo 0.1 to 0.3, over the prefix index of `dynamo.kv_router`."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from dynamo.compat.router_events import (
    TOPIC,
    WANTED_INTERVAL_S,
    WANTED_TOPIC,
    KvCacheEvent,
    RouterEvent,
    token_hashes,
    topic_prefix,
)
from dynamo.errors import TransportError
from dynamo.kv_router.approximate_index import TTL_S, ApproximateIndex
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes
from dynamo.kv_router.index import PrefixIndex

if TYPE_CHECKING:
    from dynamo.runtime.component import Component

log = logging.getLogger(__name__)

UPSTREAM_TOPIC = "kv_events"
"""where ai-dynamo's own publishers send; this project's workers send messages of another form there"""
HASH_TOKENS = 2
"""A block's 64-bit hash counts as two tokens of 32 bits, so that the index chains hashes as it chains tokens."""
UNLIMITED = 1 << 62

_decode_event = msgspec.json.Decoder(KvCacheEvent).decode
_decode_router_event = msgspec.json.Decoder(RouterEvent).decode


@dataclass
class OverlapScores:
    """How many leading blocks of a prompt each worker has."""

    scores: dict[int, int] = field(default_factory=dict)
    """by worker, those that have none left out"""
    frequencies: list[int] = field(default_factory=list)
    """how often each block was looked up lately; empty unless the tree has an expiration"""


class _Slots:
    """Numbers workers by small ints, for an index."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # by worker
        self._workers: dict[int, int] = {}  # by slot

    def slot(self, worker: int) -> int:
        if worker not in self._slots:
            slot = next(slot for slot in itertools.count() if slot not in self._workers)
            self._slots[worker] = slot
            self._workers[slot] = worker
        return self._slots[worker]

    def remove(self, worker: int) -> int | None:
        """Free the slot of a worker and return it; None if it has none."""
        slot = self._slots.pop(worker, None)
        if slot is not None:
            del self._workers[slot]
        return slot

    def scores(self, overlaps: dict[int, int]) -> dict[int, int]:
        """Return by worker what `overlaps` has by slot."""
        return {self._workers[slot]: overlap for slot, overlap in overlaps.items()}


class RadixTree:
    """The KV blocks of workers, from their events. A prompt is a list of hashes of each block's own tokens."""

    def __init__(self, expiration_duration_secs: float | None = None) -> None:
        """With `expiration_duration_secs`, look-ups of each block in that time are counted as its frequency."""
        self._expiration_s = expiration_duration_secs
        self._index = PrefixIndex()
        self._slots = _Slots()
        self._blocks: dict[int, dict[int, BlockHash]] = {}  # by worker, by the engine's hash
        self._used: dict[BlockHash, deque[float]] = {}  # times of look-ups

    def find_matches(self, sequence: Sequence[int], early_exit: bool = False) -> OverlapScores:
        """Return how many leading blocks of `sequence` each worker has.

        With `early_exit` the search ends at the first block that a single worker has.
        """
        prompt = _chained(sequence)
        scores = self._slots.scores(self._index.overlaps(prompt))
        if early_exit and scores:
            best = max(scores, key=scores.__getitem__)
            others = max((score for worker, score in scores.items() if worker != best), default=0)
            scores[best] = min(scores[best], others + 1)
        found = prompt[: max(scores.values(), default=0)]
        return OverlapScores(scores, [] if self._expiration_s is None else self._count(found, self._expiration_s))

    def _count(self, blocks: Iterable[BlockHash], expiration_s: float) -> list[int]:
        """Count a look-up of each block; return the numbers of the earlier ones, zeros left out."""
        now_s = time.monotonic()
        frequencies = []
        for block in blocks:
            used = self._used.setdefault(block, deque())
            while used and used[0] < now_s - expiration_s:
                used.popleft()
            frequencies.append(len(used))
            used.append(now_s)
        return [frequency for frequency in frequencies if frequency]

    def apply_event(self, worker_id: int, kv_cache_event_bytes: bytes) -> None:
        """Apply an event in JSON. Raises ValueError if it is not one."""
        try:
            self.apply(worker_id, _decode_event(kv_cache_event_bytes))
        except (msgspec.MsgspecError, OverflowError) as error:
            raise ValueError(f"Failed to deserialize KvCacheEvent: {error}") from None

    def apply(self, worker_id: int, event: KvCacheEvent) -> None:
        """Apply an event; blocks after an unknown one are left out, unknown blocks are not removed.

        Raises OverflowError for a hash of more than 64 bits.
        """
        if event.data == "cleared":
            self.clear_all_blocks(worker_id)
            return
        blocks = self._blocks.setdefault(worker_id, {})
        if (stored := event.data.stored) is not None:
            parent = ROOT if stored.parent_hash is None else blocks.get(stored.parent_hash)
            if parent is None:
                log.debug("worker %x stored blocks after an unknown one: left out", worker_id)
                return
            chain = _chained([block.tokens_hash for block in stored.blocks], parent)
            blocks.update(zip((block.block_hash for block in stored.blocks), chain, strict=True))
            self._index.add(self._slots.slot(worker_id), chain)
        if (removed := event.data.removed) is not None:
            known = [blocks.pop(block_hash) for block_hash in removed.block_hashes if block_hash in blocks]
            self._index.remove(self._slots.slot(worker_id), known)
            for block in known:
                if block not in self._index.holders:
                    self._used.pop(block, None)

    def remove_worker(self, worker_id: int) -> None:
        """Remove a worker with all its blocks."""
        self._blocks.pop(worker_id, None)
        slot = self._slots.remove(worker_id)
        if slot is not None:
            self._index.drop(slot)
            self._used = {block: used for block, used in self._used.items() if block in self._index.holders}

    clear_all_blocks = remove_worker


def _chained(hashes: Sequence[int], parent: BlockHash = ROOT) -> list[BlockHash]:
    """Return hashes that stand for the blocks before them, too."""
    return block_hashes(array("I", array("Q", hashes).tobytes()), HASH_TOKENS, parent)


class KvIndexer:
    """Follows the KV caches of all workers of a component, wherever they run, from its creation until its process ends.

    Workers are those with a `KvEventPublisher` or `ZmqKvEventPublisher` for the component, and `VllmWorker` itself. One
    that has left is forgotten.
    """

    def __init__(self, component: Component, kv_block_size: int) -> None:
        token_hashes([], kv_block_size)  # check it now
        self._kv_block_size = kv_block_size
        self._runtime = component.runtime
        self._address = (component.namespace, component.name)
        self._prefix = topic_prefix(*self._address)
        self._tree = RadixTree()
        self._workers: set[int] = set()  # the instances that etcd lists
        self._left: set[int] = set()
        self._name = b""
        """of this listener: a new one makes the workers send their caches again"""
        self._session = 0  # of the NATS connection
        self._started = asyncio.get_running_loop().create_task(self._start(), name="KvIndexer")

    def block_size(self) -> int:
        return self._kv_block_size

    async def find_matches(self, sequence: Sequence[int]) -> OverlapScores:
        """Return how many leading blocks of a prompt each worker has, by `compute_block_hash_for_seq_py` of the prompt.

        Raises TransportError if NATS could not be reached.
        """
        await asyncio.shield(self._started)
        return self._tree.find_matches(sequence)

    async def find_matches_for_request(self, token_ids: Sequence[int], lora_id: int = 0) -> OverlapScores:
        """Return how many leading blocks of a prompt each worker has; `lora_id` is ignored, as it was."""
        return await self.find_matches(token_hashes(token_ids, self._kv_block_size))

    async def _start(self) -> None:
        for topic in (TOPIC, UPSTREAM_TOPIC):
            await self._runtime.listen(self._prefix + topic, self._apply)
        await self._announce()
        self._runtime.spawn(self._keep_announcing(), name="KvIndexer announces itself")
        if not self._runtime.is_static:
            self._runtime.spawn(self._follow_workers(), name="KvIndexer follows workers")

    def _apply(self, payload: bytes) -> None:
        if not payload.startswith(b"{"):  # of this project's own workers
            return
        try:
            message = _decode_router_event(payload)
            if message.worker_id not in self._left:
                self._tree.apply(message.worker_id, message.event)
        except (msgspec.MsgspecError, OverflowError) as error:
            log.warning("dropped a KV event of %s.%s: %s", *self._address, error)

    async def _announce(self) -> None:
        if self._session != self._runtime.nats.session:  # events may have been lost with the connection
            self._session = self._runtime.nats.session
            self._name = secrets.token_hex(8).encode()
        try:
            await self._runtime.send(self._prefix + WANTED_TOPIC, self._name)
        except TransportError as error:
            log.debug("KvIndexer of %s.%s not announced: %s", *self._address, error.message)

    async def _keep_announcing(self) -> None:
        while True:
            await asyncio.sleep(WANTED_INTERVAL_S)
            await self._announce()

    async def _follow_workers(self) -> None:
        async for view in self._runtime.follow("instances/{}/{}/".format(*self._address)):
            workers = {int(key.rpartition(":")[2], 16) for key in view}
            for worker in self._workers - workers:
                self._left.add(worker)
                self._tree.remove_worker(worker)
            if workers & self._left:  # back again
                self._left -= workers
                self._session = 0
            if workers - self._workers:
                await self._announce()
            self._workers = workers


class ApproxKvIndexer:
    """Estimates the KV caches of workers from the prompts that were sent to them, without events of theirs."""

    def __init__(self, component: Component, kv_block_size: int, ttl_secs: float = TTL_S) -> None:
        """`ttl_secs`: how long a block is assumed to stay after its last use. `component` is not used."""
        token_hashes([], kv_block_size)  # check it now
        self._kv_block_size = kv_block_size
        self._approximate = ApproximateIndex(ttl_secs)
        self._slots = _Slots()

    def block_size(self) -> int:
        return self._kv_block_size

    async def find_matches_for_request(self, token_ids: Sequence[int], lora_id: int = 0) -> OverlapScores:
        """Return how many leading blocks of a prompt each worker is assumed to have."""
        self._approximate.expire(time.monotonic())
        overlaps = self._approximate.index.overlaps(block_hashes(token_ids, self._kv_block_size))
        return OverlapScores(self._slots.scores(overlaps))

    async def process_routing_decision_for_request(self, tokens: Sequence[int], worker_id: int) -> None:
        """Take note that a prompt was sent to a worker."""
        prompt = block_hashes(tokens, self._kv_block_size)
        self._approximate.add(self._slots.slot(worker_id), prompt, time.monotonic(), capacity=UNLIMITED)

"""The KV blocks of one engine: which prefixes they hold, which requests hold them, the order of eviction. Rules of vLLM v1.

Taken from vLLM 0.32 (v1/core/block_pool.py) and compared with it block by block in tests/vllm/test_mock_parity.py:

* one block of `blocks` is reserved and never used;
* a block gets a hash when all its tokens are scheduled. Requests that run side by side may store the same prefix twice:
  both copies are reported in events, looked up (the older first) and evicted independently;
* blocks without a hash are used first, then cached blocks without holders, the longest released first. A request releases
  its blocks last to first, so the end of a prompt is evicted before its beginning.

Blocks without a hash are interchangeable, so they are only counted here; vLLM has an object for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from dynamo.kv_router.events import BlocksRemoved, BlocksStored, EngineEvent
from dynamo.kv_router.hashing import BlockHash


class Block:
    """A full block in the prefix cache. It is free, that is evictable, while it has no holders."""

    __slots__ = ("hash", "holders")

    def __init__(self, hash: BlockHash) -> None:
        self.hash = hash
        self.holders = 1


class BlockPool:
    """The blocks of one rank: free, held by requests, cached under their hashes."""

    def __init__(self, blocks: int, block_size: int, *, events: bool = False) -> None:
        self.block_size = block_size
        self.usable = blocks - 1
        self.version = 0
        """grows whenever more blocks may be free, or found, than before"""
        self.free_uncached = self.usable
        """free blocks without a hash"""
        self.evictable: OrderedDict[Block, None] = OrderedDict()
        self.cached: dict[BlockHash, Block] = {}
        self.duplicates: dict[BlockHash, list[Block]] = {}
        """further blocks of a hash in `cached`, in the order of their storing"""
        self.events: list[EngineEvent] | None = [] if events else None

    @property
    def free(self) -> int:
        """Number of blocks that no request holds."""
        return self.free_uncached + len(self.evictable)

    @property
    def usage(self) -> float:
        """Fraction of the blocks that requests hold, 0 to 1."""
        return 1.0 - self.free / self.usable

    def find(self, hashes: Sequence[BlockHash], limit: int) -> list[Block]:
        """Return the cached blocks of a prompt's longest prefix, at most `limit`. `hold` must follow to keep them."""
        found: list[Block] = []
        for hash in islice(hashes, limit):
            block = self.cached.get(hash)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[Block]) -> None:
        """Add a holder to each block, so that it is not evicted."""
        for block in blocks:
            if not block.holders:
                del self.evictable[block]
            block.holders += 1

    def allocate(self, count: int) -> None:
        """Allocate `count` blocks without a hash, at most `free`; cached blocks are evicted where that is needed."""
        to_evict = count - self.free_uncached
        if to_evict <= 0:
            self.free_uncached -= count
            return
        self.free_uncached = 0
        removed = []
        for _ in range(to_evict):
            block, _ = self.evictable.popitem(last=False)
            self._forget(block)
            removed.append(block.hash)
        if self.events is not None:
            self.events.append(BlocksRemoved(removed))

    def store(self, parent: BlockHash | None, hashes: Sequence[BlockHash], token_ids: Sequence[int]) -> list[Block]:
        """Cache as many allocated blocks under `hashes` and return them, held once.

        `parent` is the hash of the block before them, None at a prompt's beginning; `token_ids` are for the event.
        """
        self.version += 1
        blocks = []
        for hash in hashes:
            block = Block(hash)
            if self.cached.setdefault(hash, block) is not block:
                self.duplicates.setdefault(hash, []).append(block)
            blocks.append(block)
        if self.events is not None:
            self.events.append(BlocksStored(hashes, parent, token_ids, self.block_size))
        return blocks

    def release(self, blocks: Sequence[Block], uncached: int) -> None:
        """Release the blocks of a request: the cached ones, from the prompt's beginning on, and `uncached` further ones."""
        self.version += 1
        self.free_uncached += uncached
        for block in reversed(blocks):
            block.holders -= 1
            if not block.holders:
                self.evictable[block] = None

    def drain_events(self) -> list[EngineEvent]:
        """Return the events since the last call."""
        events = self.events
        if not events:
            return []
        self.events = []
        return events

    def _forget(self, block: Block) -> None:
        """Remove an evicted block from the look-up; its oldest duplicate takes its place."""
        hash = block.hash
        duplicates = self.duplicates.get(hash)
        if not duplicates:
            del self.cached[hash]
            return
        if self.cached[hash] is block:
            self.cached[hash] = duplicates.pop(0)
        else:
            duplicates.remove(block)
        if not duplicates:
            del self.duplicates[hash]

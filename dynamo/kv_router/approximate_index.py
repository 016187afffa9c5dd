"""Index of the prompts sent to each cache: stands in for the KV events of engines that emit none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo.kv_router.hashing import BlockHash
from dynamo.kv_router.index import PrefixIndex

TTL_S = 120.0
"""How long a block is assumed to stay after its last use; the default of Dynamo's mode without events."""


class ApproximateIndex:
    """The blocks of the prompts sent to each cache, least recently used first. Times are a monotonic clock's."""

    def __init__(self, ttl_s: float = TTL_S) -> None:
        self.ttl_s = ttl_s
        self.index = PrefixIndex()
        self._last_used: dict[int, OrderedDict[BlockHash, float]] = {}  # by slot

    def add(self, slot: int, prompt: Sequence[BlockHash], now_s: float, capacity: int) -> None:
        """Add a prompt sent to a cache of `capacity` blocks. Where they are too many, ends of prompts go first."""
        last_used = self._last_used.setdefault(slot, OrderedDict())
        self.index.add(slot, [block for block in prompt if block not in last_used])
        for block in reversed(prompt):
            last_used[block] = now_s
            last_used.move_to_end(block)
        self.index.remove(slot, [last_used.popitem(last=False)[0] for _ in range(len(last_used) - capacity)])

    def expire(self, now_s: float) -> None:
        """Remove the blocks that were not used for `ttl_s`."""
        for slot, last_used in self._last_used.items():
            expired = []
            while last_used and next(iter(last_used.values())) <= now_s - self.ttl_s:
                expired.append(last_used.popitem(last=False)[0])
            self.index.remove(slot, expired)

    def drop(self, slot: int) -> None:
        """Remove a cache with all its blocks."""
        self._last_used.pop(slot, None)
        self.index.drop(slot)

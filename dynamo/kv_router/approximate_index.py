"""What was sent where: stands in for the events of caches that tell none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynamo.kv_router.hashing import BlockHash
from dynamo.kv_router.index import PrefixIndex

TTL_S = 120.0
"""How long a block is thought to stay after it was last used; Dynamo's default in its mode without events."""


class ApproximateIndex:
    """For each cache the blocks of the requests sent there, least recently used first; times are a monotonic clock's."""

    def __init__(self, ttl_s: float = TTL_S) -> None:
        self.ttl_s = ttl_s
        self.index = PrefixIndex()
        self._used: dict[int, OrderedDict[BlockHash, float]] = {}

    def add(self, slot: int, prompt: Sequence[BlockHash], now_s: float, capacity: int) -> None:
        """A prompt went to a cache of `capacity` blocks. The end of a prompt is the first to be forgotten."""
        used = self._used.setdefault(slot, OrderedDict())
        new = [hash for hash in prompt if hash not in used]
        for hash in reversed(prompt):
            used[hash] = now_s
            used.move_to_end(hash)
        self.index.add(slot, new)
        self.index.remove(slot, [used.popitem(last=False)[0] for _ in range(len(used) - capacity)])

    def expire(self, now_s: float) -> None:
        for slot, used in self._used.items():
            old = []
            while used and next(iter(used.values())) <= now_s - self.ttl_s:
                old.append(used.popitem(last=False)[0])
            self.index.remove(slot, old)

    def drop(self, slot: int) -> None:
        self._used.pop(slot, None)
        self.index.drop(slot)

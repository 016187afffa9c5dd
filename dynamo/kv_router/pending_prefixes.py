"""Prompts that were placed on a cache which does not hold their blocks yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from dynamo.kv_router.hashing import BlockHash
from dynamo.kv_router.index import PrefixIndex

PENDING_PROMPT_S = 30.0
"""How long a placed prompt counts as cached before events confirm it; it may wait for a place in the batch."""


class PendingPrompt(NamedTuple):
    blocks: Sequence[BlockHash]
    until_s: float


class PendingPrefixes:
    """Placed prompts, each found by the block that its cache computes next. Times are a monotonic clock's.

    `update` must be called when a cache has stored blocks: a long prompt is computed in chunks, and the block to be
    computed next changes with each.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self.prompts: dict[BlockHash, dict[int, PendingPrompt]] = {}
        """by the block that is computed next, by slot"""
        self._next_blocks = defaultdict[int, set[BlockHash]](set)  # by slot, the keys of `prompts` that have it

    def add(self, slot: int, prompt: Sequence[BlockHash], held: int, until_s: float) -> None:
        """Add a prompt of which the cache holds the first `held` blocks, or will hold them for an earlier prompt."""
        next_block = prompt[held]
        self.prompts.setdefault(next_block, {})[slot] = PendingPrompt(prompt, until_s)
        self._next_blocks[slot].add(next_block)

    def _remove(self, slot: int, next_block: BlockHash) -> PendingPrompt:
        self._next_blocks[slot].remove(next_block)
        by_slot = self.prompts[next_block]
        prompt = by_slot.pop(slot)
        if not by_slot:
            del self.prompts[next_block]
        return prompt

    def update(self, slot: int) -> None:
        """Compare a cache's pending prompts with the index, which has got new blocks of this cache."""
        for next_block in self._next_blocks.get(slot, set()) & self._index.blocks(slot):
            prompt = self._remove(slot, next_block)
            held = self._index.overlap(slot, prompt.blocks)
            if held < len(prompt.blocks):
                self.add(slot, prompt.blocks, held, prompt.until_s)

    def drop(self, slot: int) -> None:
        """Remove a cache with all its prompts."""
        for next_block in list(self._next_blocks.get(slot, ())):
            self._remove(slot, next_block)
        self._next_blocks.pop(slot, None)

    def expire(self, now_s: float) -> None:
        for next_block, by_slot in list(self.prompts.items()):
            for slot in [slot for slot, prompt in by_slot.items() if prompt.until_s <= now_s]:
                self._remove(slot, next_block)

    def raise_overlaps(self, overlaps: dict[int, int], prompt: Sequence[BlockHash], now_s: float) -> None:
        """Raise a prompt's overlaps, by slot, to what the caches will hold when their pending prompts are computed.

        A pending prompt matters if it continues where a cache's overlap with this prompt ends: there its next block is
        this prompt's next block.
        """
        for depth in {0, *overlaps.values()}:
            if depth == len(prompt):
                continue
            for slot, pending in self.prompts.get(prompt[depth], {}).items():
                if pending.until_s > now_s:
                    overlaps[slot] = max(overlaps.get(slot, 0), common_blocks(prompt, pending.blocks))


def common_blocks(one: Sequence[BlockHash], other: Sequence[BlockHash]) -> int:
    """Return how many first blocks two prompts have in common: equal hashes mean equal prefixes, so bisection finds it."""
    low = 0
    high = min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low

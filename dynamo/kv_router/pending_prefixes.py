"""Prompts that were placed and whose blocks the caches do not have yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from dynamo.kv_router.hashing import BlockHash
from dynamo.kv_router.index import Match, PrefixIndex

EXPECTED_S = 30.0
"""How long a placed prompt is taken for cached before events confirm it; it may wait for a place in the batch."""


class PendingPrefixes:
    """A prompt is found by the block that its cache computes next. `follow` must be called when a cache has got blocks:
    a long prompt is computed in chunks, and is expected further each time. Times are a monotonic clock's."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self.prompts: dict[BlockHash, dict[int, tuple[Sequence[BlockHash], float]]] = {}
        """by the block that is computed next, by slot: the prompt, and until when it is expected"""
        self._next = defaultdict[int, set[BlockHash]](set)  # the keys of `prompts` by slot

    def add(self, slot: int, prompt: Sequence[BlockHash], held: int, until_s: float) -> None:
        """The cache has the first `held` blocks of the prompt, or will have them by what is expected already."""
        next = prompt[held]
        self.prompts.setdefault(next, {})[slot] = (prompt, until_s)
        self._next[slot].add(next)

    def _take(self, slot: int, next: BlockHash) -> tuple[Sequence[BlockHash], float]:
        self._next[slot].remove(next)
        prompts = self.prompts[next]
        taken = prompts.pop(slot)
        if not prompts:
            del self.prompts[next]
        return taken

    def follow(self, slot: int) -> None:
        """The cache has got blocks."""
        expected = self._next.get(slot)
        if expected:
            for next in expected & self._index.blocks(slot):
                prompt, until_s = self._take(slot, next)
                held = self._index.held(slot, prompt)
                if held < len(prompt):
                    self.add(slot, prompt, held, until_s)

    def drop(self, slot: int) -> None:
        """The cache is gone."""
        for next in list(self._next.get(slot, ())):
            self._take(slot, next)
        self._next.pop(slot, None)

    def expire(self, now_s: float) -> None:
        for next, prompts in list(self.prompts.items()):
            for slot in [slot for slot, (_, until_s) in prompts.items() if until_s <= now_s]:
                self._take(slot, next)

    def added(self, matches: list[Match], prompt: Sequence[BlockHash], caches: int, now_s: float) -> list[Match]:
        """The matches of a prompt, not empty, with what these caches will have of it."""
        expected, end = self.prompts, len(prompt)
        next = [prompt[0]] if prompt[0] in expected else []
        for blocks, _ in matches:
            if blocks < end and prompt[blocks] in expected:
                next.append(prompt[blocks])
        if not next:
            return matches
        least = {
            slot: common(prompt, placed)
            for hash in next
            for slot, (placed, until_s) in expected[hash].items()
            if until_s > now_s and caches >> slot & 1
        }
        return _raised(matches, least)


def _raised(matches: list[Match], least: dict[int, int]) -> list[Match]:
    """The same matches with at least so many blocks for some slots, shortest first as before."""
    found: list[Match] = []
    for blocks, caches in matches:
        for slot, expected in list(least.items()):
            if caches >> slot & 1:
                if expected > blocks:
                    caches ^= 1 << slot
                else:
                    del least[slot]
        if caches:
            found.append((blocks, caches))
    found += [(blocks, 1 << slot) for slot, blocks in least.items()]
    return sorted(found)


def common(one: Sequence[BlockHash], other: Sequence[BlockHash]) -> int:
    """Blocks that two prompts have in common; equal hashes mean equal prefixes, so bisection finds the end."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low

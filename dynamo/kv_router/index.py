"""Which caches hold which blocks: a dictionary from block hash to the set of its holders, kept as the bits of an int.

A block's hash stands for everything before it, and engines evict the end of a prefix before its beginning. So the
holders of block i + 1 are among those of block i, and how far each cache follows a prompt is found by bisection: a few
look-ups for each depth that occurs, not one for each block. (Jump search over a positional index is Dynamo's newest
design too; this one needs no threads.)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dynamo.kv_router.hashing import BlockHash

if TYPE_CHECKING:
    from dynamo.kv_router.cost import Loads

Match = tuple[int, int]
"""`(blocks, caches)`: these caches, as bits, hold the first so many blocks of a prompt and not the next one."""


def slots(caches: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while caches:
        lowest = caches & -caches
        yield lowest.bit_length() - 1
        caches ^= lowest


class PrefixIndex:
    """Caches are numbered by small ints, their slots."""

    def __init__(self) -> None:
        self.holders: dict[BlockHash, int] = {}
        self._blocks: dict[int, set[BlockHash]] = {}
        self._bits: dict[int, int] = {}  # one object for each slot: most blocks have one holder, and share it
        self._split = 0  # where the first caches dropped out of the last prompt of which others held more

    def __len__(self) -> int:
        """Different blocks, whoever holds them."""
        return len(self.holders)

    def blocks(self, slot: int) -> set[BlockHash]:
        """What a cache holds."""
        return self._blocks.get(slot, set())

    def held(self, slot: int, prompt: Sequence[BlockHash]) -> int:
        """How many blocks of a prompt a cache holds, counted from its beginning."""
        # in C, and from the end, since bisection wants False first
        return len(prompt) - bisect_left(prompt[::-1], True, key=self.blocks(slot).__contains__)

    def add(self, slot: int, hashes: Collection[BlockHash]) -> None:
        bit, holders = self._bits.setdefault(slot, 1 << slot), self.holders
        get = holders.get
        for hash in hashes:
            others = get(hash)
            holders[hash] = bit if others is None else others | bit
        self._blocks.setdefault(slot, set()).update(hashes)

    def remove(self, slot: int, hashes: Iterable[BlockHash]) -> None:
        """Blocks that the cache does not hold are passed over."""
        bit, holders = 1 << slot, self.holders
        for hash in hashes:
            held = holders.get(hash, 0)
            if held == bit:
                del holders[hash]
            elif held & bit:
                holders[hash] = held ^ bit
        mine = self._blocks.get(slot)
        if mine is not None:
            mine.difference_update(hashes)

    def replace(self, slot: int, hashes: Iterable[BlockHash]) -> None:
        """The cache holds exactly these."""
        new, old = set(hashes), self.blocks(slot)
        self.remove(slot, old - new)
        self.add(slot, new - old)

    def drop(self, slot: int) -> None:
        """The cache is gone."""
        self.remove(slot, self._blocks.pop(slot, ()))

    def matches(
        self,
        prompt: Sequence[BlockHash],
        caches: int,
        blind: int = 0,
        guessed: PrefixIndex | None = None,
        loads: Loads | None = None,
    ) -> list[Match]:
        """How far each of `caches` follows a prompt, shortest first; those that lack its first block are in no match.

        For the caches of `blind`, `guessed` is asked in place of this index. Where only the cheapest of all caches is
        wanted, `loads` spares looking where that cannot be: a cache that goes on alone and is too loaded, however much
        it holds, is left out. A cache that lost a block and kept later ones may be said to follow further than it does.
        """
        found: list[Match] = []
        length = len(prompt)
        if not length:
            return found
        get = self._told_or(guessed, blind) if blind and guessed is not None else self.holders.get
        low, high, group = 0, length, get(prompt[0], 0) & caches
        holders, split = group, self._split  # most prompts leave what is common to all where the last one did
        if 1 < split < length and get(prompt[split - 1], 0) & caches == group:
            low, group = split, get(prompt[split], 0) & group
            if group != holders:
                found.append((split, holders ^ group))
        limit = loads.limit(length, low, holders) if group and loads is not None else math.inf
        others: list[tuple[int, int, int]] = []
        while group:
            # these caches hold the block `low`, none of them the block `high`
            slot = group.bit_length() - 1
            if loads is None or loads.weighed[slot] <= limit or group & (group - 1):
                # where the last of them ends: bisection in C, from the end, since it wants False first
                index = guessed if blind and guessed is not None and blind >> slot & 1 else self
                end = length - bisect_left(
                    prompt[::-1], True, length - high, length - low - 1, key=index._blocks[slot].__contains__
                )
                if group & (group - 1):
                    reached = get(prompt[end - 1], 0) & group
                    further = get(prompt[end], 0) & reached if end < high else 0
                    if reached != group:
                        others.append((low, end - 1, group ^ reached))
                    if further:
                        others.append((end, high, further))
                    group = reached ^ further
                found.append((end, group))
            if not others:
                break
            low, high, group = others.pop()
        if len(found) > 1:
            found.sort()
            self._split = found[0][0]
        return found

    def _told_or(self, guessed: PrefixIndex, blind: int) -> Callable[[BlockHash, int], int]:
        told, guess = self.holders.get, guessed.holders.get
        return lambda hash, none: (told(hash, none) & ~blind) | (guess(hash, none) & blind)

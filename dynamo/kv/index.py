"""Which caches hold which blocks: a dictionary from block hash to the set of its holders, kept as the bits of an int.

A block's hash stands for everything before it, and engines evict the end of a prefix before its beginning. So the
holders of block i + 1 are among those of block i, and how far each cache follows a prompt is found by bisection: a few
look-ups for each depth that occurs, not one for each block. (Jump search over a positional index is Dynamo's newest
design too; this one needs no threads.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from dynamo.kv.hashing import BlockHash

_NOWHERE: Mapping[BlockHash, int] = {}

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

    def add(self, slot: int, hashes: Iterable[BlockHash]) -> None:
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
        self, prompt: Sequence[BlockHash], caches: int, also: Mapping[BlockHash, int] = _NOWHERE, blind: int = 0
    ) -> list[Match]:
        """How far each of `caches` follows a prompt, shortest first; those that lack its first block are in no match.

        For the caches of `blind`, `also` is asked in place of this index. A cache that lost a block and kept later ones
        may be said to follow further than it does.
        """
        found: list[Match] = []
        if not prompt:
            return found
        length, low = len(prompt), 0
        get = self._seen_or(also, blind) if blind & caches else self.holders.get
        at_low = get(prompt[0], 0) & caches
        if not at_low:
            return found
        split = self._split  # most prompts leave what is common to all where the last one did
        if 1 < split < length and get(prompt[split - 1], 0) & caches == at_low:
            low = split - 1
        end = length
        if not blind & caches:
            # where nobody holds anything any more: the bisection in C, from the end since it wants False first
            end -= bisect_left(prompt[::-1], True, 0, length - low - 1, key=self.holders.__contains__)
        high = end - 1
        at_last = at_high = get(prompt[high], 0) & at_low
        if at_last == at_low:
            return [(end, at_last)]
        # caches of `at_low` hold block `low`, those of `at_high` also block `high`: the rest drop out in between
        others: list[tuple[int, int, int, int]] = []
        if low and split < high:
            at_split = get(prompt[split], 0) & at_low
            if at_split == at_low:
                low = split
            else:
                if at_split != at_high:
                    others.append((split, high, at_split, at_high))
                high, at_high = split, at_split
        while True:
            while high - low > 1:
                middle = (low + high) // 2
                at_middle = get(prompt[middle], 0) & at_low
                if at_middle == at_high:
                    high = middle
                elif at_middle == at_low:
                    low = middle
                else:
                    others.append((middle, high, at_middle, at_high))
                    high, at_high = middle, at_middle
            found.append((high, at_low & ~at_high))
            if not others:
                break
            low, high, at_low, at_high = others.pop()
        if at_last:
            found.append((end, at_last))
        if len(found) > 1:
            self._split = found[0][0]
        return found

    def _seen_or(self, also: Mapping[BlockHash, int], blind: int) -> Callable[[BlockHash, int], int]:
        seen, guessed = self.holders.get, also.get
        return lambda hash, none: (seen(hash, none) & ~blind) | (guessed(hash, none) & blind)

"""Which caches hold which blocks: a dictionary from block hash to the set of its holders, kept as the bits of an int.

A block's hash stands for everything before it, and engines evict the end of a prefix before its beginning. So the
holders of block i + 1 are among those of block i, and how far each cache follows a prompt is found by bisection: a few
look-ups for each depth that occurs, not one for each block. (Jump search over a positional index is Dynamo's newest
design too; this one needs no threads.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dynamo.kv.hashing import BlockHash

_NOWHERE: Mapping[BlockHash, int] = {}


class Match(NamedTuple):
    """`caches`, as bits, hold the first `blocks` blocks of a prompt and not the next one."""

    blocks: int
    caches: int


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
        self._split = 0  # where the first caches dropped out of the last prompt of which others held more

    def __len__(self) -> int:
        """Different blocks, whoever holds them."""
        return len(self.holders)

    def blocks(self, slot: int) -> set[BlockHash]:
        """What a cache holds."""
        return self._blocks.get(slot, set())

    def add(self, slot: int, hashes: Iterable[BlockHash]) -> None:
        bit, holders = 1 << slot, self.holders
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
        """How far each of `caches` follows a prompt; those that lack its first block are in no match.

        For the caches of `blind`, `also` is asked in place of this index. A cache that lost a block and kept later ones
        may be said to follow further than it does.
        """
        found: list[Match] = []
        if not prompt:
            return found
        get = self._seen_or(also, blind) if blind & caches else self.holders.get
        low, high, at_low, at_high = 0, len(prompt), get(prompt[0], 0) & caches, 0
        # caches of `at_low` hold block `low`, those of `at_high` also block `high`: the rest drop out in between
        others: list[tuple[int, int, int, int]] = []
        if not at_low:
            return found
        if high > 1:
            at_end = get(prompt[-1], 0) & at_low
            if at_end == at_low:
                return [Match(high, at_low)]
            if at_end:
                found.append(Match(high, at_end))
            high, at_high = high - 1, at_end
        if low < (guess := self._split) < high:
            # most prompts leave what is common to all where the last one did
            at_guess = get(prompt[guess], 0) & at_low
            if at_guess == at_low:
                low = guess
            else:
                if at_guess != at_high:
                    others.append((guess, high, at_guess, at_high))
                high, at_high = guess, at_guess
                if get(prompt[guess - 1], 0) & at_low == at_low:
                    low = guess - 1
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
            found.append(Match(high, at_low & ~at_high))
            if not others:
                if len(found) > 1:
                    self._split = min(found)[0]
                return found
            low, high, at_low, at_high = others.pop()

    def _seen_or(self, also: Mapping[BlockHash, int], blind: int) -> Callable[[BlockHash, int], int]:
        seen, guessed = self.holders.get, also.get
        return lambda hash, none: (seen(hash, none) & ~blind) | (guessed(hash, none) & blind)

"""Prefix index: which caches hold which blocks.

A dictionary from block hash to the set of the block's holders. A block's hash stands for everything before it, and
engines evict the end of a prefix before its beginning, so the holders of block i + 1 are among those of block i. How far
the caches follow a prompt is therefore found by bisection: a few look-ups for each different depth, not one for each
block. (Jump search over a positional index is Dynamo's newest design too; this one needs no threads.)

A set of holders is the bits of an int: bit n stands for slot n. With a million blocks that is a third of the memory of
Python sets, and "do all of these caches hold the block" is one operation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

from dynamo.kv_router.hashing import BlockHash


def slots_of(holders: int) -> list[int]:
    """Return the slots of a set of holders: the numbers of the bits that are 1, counted from the lowest."""
    return [slot for slot, bit in enumerate(reversed(f"{holders:b}")) if bit == "1"]


class PrefixIndex:
    """Blocks by cache. Caches are numbered by small ints, their slots."""

    def __init__(self) -> None:
        self.holders: dict[BlockHash, int] = {}
        """by block, the set of slots (as bits) that hold it"""
        self._blocks: dict[int, set[BlockHash]] = {}
        self._bits: dict[int, int] = {}  # one int object for each slot: most blocks have one holder and share it

    def __len__(self) -> int:
        """Return the number of different blocks."""
        return len(self.holders)

    def blocks(self, slot: int) -> set[BlockHash]:
        """Return the blocks that a cache holds."""
        return self._blocks.get(slot, set())

    def overlap(self, slot: int, prompt: Sequence[BlockHash]) -> int:
        """Return how many blocks of a prompt a cache holds, counted from the beginning."""
        held = self.blocks(slot)
        return bisect_left(prompt, True, key=lambda block: block not in held)

    def overlaps(self, prompt: Sequence[BlockHash]) -> dict[int, int]:
        """Return by slot how many blocks of a prompt each cache holds, counted from the beginning; 0 is left out.

        A cache that lost a block and kept later ones may get too large a number.
        """
        found: dict[int, int] = {}
        if not prompt:
            return found
        holders = self.holders.get(prompt[0], 0)
        depth = 1  # `holders` have all blocks before this one
        while holders:
            depth = self._shared_depth(prompt, holders, depth)
            followers = self.holders.get(prompt[depth], 0) & holders if depth < len(prompt) else 0
            found.update(dict.fromkeys(slots_of(holders & ~followers), depth))
            holders = followers
            depth += 1
        return found

    def _shared_depth(self, prompt: Sequence[BlockHash], caches: int, depth: int) -> int:
        """Return how many blocks of a prompt all `caches` hold, knowing that they hold the first `depth`."""
        holders = self.holders.get
        return bisect_left(prompt, True, depth, key=lambda block: holders(block, 0) & caches != caches)

    def add(self, slot: int, hashes: Collection[BlockHash]) -> None:
        bit = self._bits.setdefault(slot, 1 << slot)
        holders = self.holders
        for block in hashes:
            others = holders.get(block)
            holders[block] = bit if others is None else others | bit
        self._blocks.setdefault(slot, set()).update(hashes)

    def remove(self, slot: int, hashes: Iterable[BlockHash]) -> None:
        """Remove blocks from a cache; those that it does not hold are ignored."""
        bit = 1 << slot
        holders = self.holders
        for block in hashes:
            found = holders.get(block, 0)
            if found == bit:
                del holders[block]
            elif found & bit:
                holders[block] = found ^ bit
        if slot in self._blocks:
            self._blocks[slot].difference_update(hashes)

    def replace(self, slot: int, hashes: Iterable[BlockHash]) -> None:
        """Make a cache hold exactly these blocks."""
        new = set(hashes)
        old = self.blocks(slot)
        self.remove(slot, old - new)
        self.add(slot, new - old)

    def drop(self, slot: int) -> None:
        """Remove a cache with all its blocks."""
        self.remove(slot, self._blocks.pop(slot, ()))

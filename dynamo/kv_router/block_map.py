"""Contents of one engine's prefix cache, translated from the engine's hashes to those of the whole deployment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from dynamo.kv_router.events import BlocksCleared, BlocksRemoved, BlocksStored, Change, EngineEvent
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes, pack


def salted(parent: BlockHash, salt: str) -> BlockHash:
    """Return the parent to hash a salted block with, so that its hash and later ones never match plain blocks."""
    return BlockHash(xxh3_64_intdigest(salt.encode(), parent))


class BlockMap:
    """The blocks of one rank: an engine's events go in, changes and snapshots in terms of `BlockHash` come out.

    An engine may store a block several times: it is reported as stored once, and as removed with its last copy. A block
    whose parent is unknown (the event that stored the parent was lost) is left out, with all blocks after it; so is a
    block of another size than `block_size`. Removals of unknown blocks are ignored.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._blocks: dict[int, BlockHash] = {}  # by the engine's hash
        self._extra_copies: dict[int, int] = {}  # by the engine's hash, copies beyond the first
        self._references: dict[BlockHash, int] = {}  # how many of the engine's hashes stand for a block
        self._changes: list[tuple[bool, list[BlockHash]]] = []  # stored or removed, in turns

    def apply(self, events: Iterable[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, BlocksStored):
                self._store(event)
            elif isinstance(event, BlocksRemoved):
                self._remove(event)
            else:
                self._clear(event)

    def changes(self) -> list[Change]:
        """Return the changes since the last call, in order; consecutive ones of one kind are one change."""
        changes = self._changes
        self._changes = []
        return [Change(stored, pack(hashes)) for stored, hashes in changes]

    def blocks(self) -> list[BlockHash]:
        """Return all blocks held now: the result of all changes, of those not yet returned too."""
        return list(self._references)

    def overlap(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many blocks of a prompt are held, counted from the beginning."""
        return next((number for number, block in enumerate(hashes) if block not in self._references), len(hashes))

    def __len__(self) -> int:
        return len(self._references)

    def _store(self, event: BlocksStored) -> None:
        size = self.block_size
        if event.block_size != size or len(event.token_ids) != size * len(event.hashes):
            return
        parent = ROOT if event.parent is None else self._blocks.get(event.parent)
        if parent is None:
            for engine_hash in event.hashes:  # another copy of a known block counts, whatever its parent is
                if engine_hash in self._blocks:
                    self._add_copy(engine_hash)
            return
        new: list[BlockHash] = []
        for engine_hash, block in zip(event.hashes, self._hashes(event, parent), strict=True):
            if engine_hash in self._blocks:
                self._add_copy(engine_hash)
                continue
            self._blocks[engine_hash] = block
            if block in self._references:
                self._references[block] += 1
            else:
                self._references[block] = 1
                new.append(block)
        self._add_change(True, new)

    def _add_copy(self, engine_hash: int) -> None:
        self._extra_copies[engine_hash] = self._extra_copies.get(engine_hash, 0) + 1

    def _hashes(self, event: BlocksStored, parent: BlockHash) -> list[BlockHash]:
        if not event.salt:
            return block_hashes(event.token_ids, self.block_size, parent)
        hashes: list[BlockHash] = []
        # each block is salted, so that the hashes do not depend on how blocks are spread over events
        for start in range(0, len(event.token_ids), self.block_size):
            block = event.token_ids[start : start + self.block_size]
            hashes += block_hashes(block, self.block_size, salted(parent, event.salt))
            parent = hashes[-1]
        return hashes

    def _remove(self, event: BlocksRemoved) -> None:
        removed: list[BlockHash] = []
        for engine_hash in event.hashes:
            if engine_hash in self._extra_copies:
                self._extra_copies[engine_hash] -= 1
                if not self._extra_copies[engine_hash]:
                    del self._extra_copies[engine_hash]
                continue
            block = self._blocks.pop(engine_hash, None)
            if block is None:
                continue
            self._references[block] -= 1
            if not self._references[block]:
                del self._references[block]
                removed.append(block)
        self._add_change(False, removed)

    def _clear(self, event: BlocksCleared) -> None:
        self._add_change(False, self.blocks())
        self._blocks.clear()
        self._extra_copies.clear()
        self._references.clear()

    def _add_change(self, stored: bool, blocks: list[BlockHash]) -> None:
        if not blocks:
            return
        if self._changes and self._changes[-1][0] is stored:
            self._changes[-1][1].extend(blocks)
        else:
            self._changes.append((stored, blocks))

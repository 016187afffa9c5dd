"""What one engine's prefix cache holds, by the names that the whole deployment uses for blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from dynamo.kv_router.events import BlocksCleared, BlocksRemoved, BlocksStored, Change, EngineEvent
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes, pack


def salted(parent: BlockHash, salt: str) -> BlockHash:
    """What a block with a salt takes for its parent: its hash, and those behind it, never match plain ones."""
    return BlockHash(xxh3_64_intdigest(salt.encode(), parent))


class BlockMap:
    """The blocks of one rank: an engine's events go in, changes and snapshots in terms of `BlockHash` come out.

    An engine may store a block several times: it is announced once, and leaves when the last copy was removed. A block
    whose parent is unknown (the event that stored the parent was lost) is left out, with those behind it; so is one of
    another size than `block_size`. Removing what is unknown does nothing.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._known: dict[int, BlockHash] = {}  # by the engine's name
        self._again: dict[int, int] = {}  # copies of a name beyond the first
        self._held: dict[BlockHash, int] = {}  # how many names stand for it
        self._pending: list[tuple[bool, list[BlockHash]]] = []  # neighbours differ in kind

    def apply(self, events: Iterable[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, BlocksStored):
                self._store(event)
            elif isinstance(event, BlocksRemoved):
                self._remove(event)
            else:
                self._clear(event)

    def changes(self) -> list[Change]:
        """What has happened since the last call, in order; neighbours of one kind are one change."""
        pending, self._pending = self._pending, []
        return [Change(stored, pack(hashes)) for stored, hashes in pending]

    def blocks(self) -> list[BlockHash]:
        """All blocks held now: what the changes up to here, those not yet asked for included, lead to."""
        return list(self._held)

    def found(self, hashes: Sequence[BlockHash]) -> int:
        """How many blocks of a prompt, from the first on, are held."""
        return next((number for number, block in enumerate(hashes) if block not in self._held), len(hashes))

    def __len__(self) -> int:
        return len(self._held)

    def _store(self, event: BlocksStored) -> None:
        names, size = event.hashes, self.block_size
        if event.block_size != size or len(event.token_ids) != size * len(names):
            return
        parent = ROOT if event.parent is None else self._known.get(event.parent)
        if parent is None:
            for name in names:  # a further copy of a known block counts, whatever it stands behind
                if name in self._known:
                    self._again[name] = self._again.get(name, 0) + 1
            return
        known, held = self._known, self._held
        new: list[BlockHash] = []
        for name, block in zip(names, self._hashes(event, parent), strict=True):
            if name in known:
                self._again[name] = self._again.get(name, 0) + 1
                continue
            known[name] = block
            if block in held:
                held[block] += 1
            else:
                held[block] = 1
                new.append(block)
        self._note(True, new)

    def _hashes(self, event: BlocksStored, parent: BlockHash) -> list[BlockHash]:
        if not event.salt:
            return block_hashes(event.token_ids, self.block_size, parent)
        hashes: list[BlockHash] = []
        for start in range(0, len(event.token_ids), self.block_size):  # salted one by one, however events are cut
            block = event.token_ids[start : start + self.block_size]
            hashes += block_hashes(block, self.block_size, salted(parent, event.salt))
            parent = hashes[-1]
        return hashes

    def _remove(self, event: BlocksRemoved) -> None:
        gone: list[BlockHash] = []
        for name in event.hashes:
            if self._again and name in self._again:
                self._again[name] -= 1
                if not self._again[name]:
                    del self._again[name]
                continue
            block = self._known.pop(name, None)
            if block is None:
                continue
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
                gone.append(block)
        self._note(False, gone)

    def _clear(self, event: BlocksCleared) -> None:
        self._note(False, self.blocks())
        self._known.clear()
        self._again.clear()
        self._held.clear()

    def _note(self, stored: bool, blocks: list[BlockHash]) -> None:
        if not blocks:
            return
        if self._pending and self._pending[-1][0] is stored:
            self._pending[-1][1].extend(blocks)
        else:
            self._pending.append((stored, blocks))

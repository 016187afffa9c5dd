"""The KV blocks of one engine: which prefixes they hold, who holds them, which go first. By the rules of vLLM v1.

Seen in vLLM 0.32 (v1/core/block_pool.py), and compared with it block by block in tests/vllm/test_mock_parity.py:

* one block of `blocks` is reserved and never used;
* a block gets a name when all its tokens are scheduled; the same prefix may be stored twice, by requests that ran side
  by side, and each of the two is told of, found (the older first) and evicted for itself;
* blocks without a name are used first, then named ones that nobody holds, the longest released first; a request
  releases its blocks last to first, so the end of a prompt goes before its beginning.

Blocks without a name are all alike, so they are a number here; vLLM has an object for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from dynamo.kv_router.events import BlocksRemoved, BlocksStored, EngineEvent
from dynamo.kv_router.hashing import BlockHash


class Block:
    """A full block that can be found by its name. Free, that is evictable, when it has no holders."""

    __slots__ = ("holders", "name")

    def __init__(self, name: BlockHash) -> None:
        self.name, self.holders = name, 1


class KvCache:
    """`version` grows whenever more may fit or be found than before."""

    def __init__(self, blocks: int, block_size: int, *, events: bool = False) -> None:
        self.block_size = block_size
        self.usable = blocks - 1
        self.version = 0
        self.unnamed = self.usable  # free ones
        self.evictable: OrderedDict[Block, None] = OrderedDict()
        self.named: dict[BlockHash, Block] = {}
        self.twins: dict[BlockHash, list[Block]] = {}  # further blocks of a name in `named`
        self.events: list[EngineEvent] | None = [] if events else None

    @property
    def free(self) -> int:
        return self.unnamed + len(self.evictable)

    @property
    def usage(self) -> float:
        """The part that requests hold, 0 to 1."""
        return 1.0 - self.free / self.usable

    def find(self, names: Sequence[BlockHash], limit: int) -> list[Block]:
        """The blocks of a prompt's beginning that are there, `limit` at most. They are not held yet."""
        found: list[Block] = []
        for name in islice(names, limit):
            block = self.named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if not block.holders:
                del self.evictable[block]
            block.holders += 1

    def take(self, count: int) -> None:
        """`count` blocks without a name, no more than are `free`; named ones are evicted for it."""
        left = count - self.unnamed
        if left <= 0:
            self.unnamed -= count
            return
        self.unnamed = 0
        removed = []
        for _ in range(left):
            block, _ = self.evictable.popitem(last=False)
            self._forget(block)
            removed.append(block.name)
        if self.events is not None:
            self.events.append(BlocksRemoved(removed))

    def store(self, parent: BlockHash | None, names: Sequence[BlockHash], token_ids: Sequence[int]) -> list[Block]:
        """Give names to as many taken blocks; `parent` is the one before them. `token_ids` are for the event."""
        self.version += 1
        blocks = []
        for name in names:
            block = Block(name)
            if self.named.setdefault(name, block) is not block:
                self.twins.setdefault(name, []).append(block)
            blocks.append(block)
        if self.events is not None:
            self.events.append(BlocksStored(names, parent, token_ids, self.block_size))
        return blocks

    def release(self, blocks: Sequence[Block], unnamed: int) -> None:
        """What a request held: its named blocks from the prompt's beginning on, and those without a name behind."""
        self.version += 1
        self.unnamed += unnamed
        for block in reversed(blocks):
            block.holders -= 1
            if not block.holders:
                self.evictable[block] = None

    def take_events(self) -> list[EngineEvent]:
        """What happened since the last call."""
        found = self.events
        if not found:
            return []
        self.events = []
        return found

    def _forget(self, block: Block) -> None:
        name = block.name
        twins = self.twins.get(name)
        if not twins:
            del self.named[name]
            return
        if self.named[name] is block:
            self.named[name] = twins.pop(0)
        else:
            twins.remove(block)
        if not twins:
            del self.twins[name]

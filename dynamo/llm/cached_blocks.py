"""The blocks in an engine's prefix caches, as its KV events report them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dynamo.kv_router.block_map import BlockMap
from dynamo.kv_router.events import EngineEvent
from dynamo.kv_router.hashing import block_hashes
from dynamo.llm.engine import Engine, EngineInfo
from dynamo.llm.protocol import GenerateRequest


class CachedBlocks:
    """One `BlockMap` per data-parallel rank of an engine.

    `follow` the engine before it starts, `open` when it has started. Events in between are dropped: the block size is not
    known yet, and no request has run.
    """

    def __init__(self) -> None:
        self.reported = False
        """True if the engine emits KV events; the maps stay empty otherwise"""
        self.ranks: list[BlockMap] = []
        self.changed = asyncio.Event()
        """set after each event, cleared by the reader"""
        self.listeners: list[Callable[[Sequence[EngineEvent]], None]] = []
        """called with the same events as the maps"""

    def follow(self, engine: Engine) -> bool:
        """Listen to the KV events of an engine that has not started; return False if it emits none."""
        self.reported = engine.kv_events(self._apply)
        return self.reported

    def open(self, info: EngineInfo) -> None:
        """Create the maps of a started engine."""
        self.ranks = [BlockMap(info.kv_block_size) for _ in range(info.ranks)]

    def _apply(self, rank: int, events: Sequence[EngineEvent]) -> None:
        if self.ranks:
            self.ranks[rank].apply(events)
            self.changed.set()
            for listener in self.listeners:
                listener(events)

    def hit_tokens(self, request: GenerateRequest) -> int:
        """Return the prompt tokens in the prefix cache; without KV events, those that the router expects there."""
        rank = request.rank or 0
        if not self.reported or not 0 <= rank < len(self.ranks):
            return request.expected_hit
        blocks = self.ranks[rank]
        return blocks.overlap(block_hashes(request.token_ids, blocks.block_size)) * blocks.block_size

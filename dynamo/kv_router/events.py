"""Messages of workers about their KV caches and their load, on the topics `kv_events` and `load`.

A worker is one process; `rank` is the number of one of its data-parallel engines, each of which has its own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec


class BlocksStored(NamedTuple):
    """Full blocks, consecutive ones of one prompt, are in an engine's prefix cache. `hashes` are the engine's own."""

    hashes: Sequence[int]
    parent: int | None
    """the engine's hash of the block before the first; None: the first begins a prompt"""
    token_ids: Sequence[int]
    """tokens of all the blocks, `len(hashes) * block_size` of them"""
    block_size: int
    salt: str = ""
    """what blocks must have in common besides tokens: LoRA adapter, cache salt, images; empty for plain text"""


class BlocksRemoved(NamedTuple):
    """Blocks were evicted, by the engine's hashes. A block that was stored twice stays until it is removed twice."""

    hashes: Sequence[int]


class BlocksCleared(NamedTuple):
    """The prefix cache is empty."""


EngineEvent = BlocksStored | BlocksRemoved | BlocksCleared


class Change(msgspec.Struct, array_like=True, gc=False):
    """Blocks that were stored in a cache or removed from it; `hashes` as `hashing.pack` encodes them."""

    stored: bool
    hashes: bytes


class KvEvents(msgspec.Struct, array_like=True, gc=False):
    """Changes of one cache in their order. `sequence` counts its messages from 1: a gap means that one was lost."""

    worker: int
    rank: int
    sequence: int
    changes: list[Change]


class SnapshotRequest(msgspec.Struct):
    """Request to a worker's endpoint `kv_snapshot` for all blocks it has."""


class KvSnapshot(msgspec.Struct, array_like=True, gc=False):
    """One part of a cache's contents after message `sequence`.

    A snapshot is a stream of these: one or more for each rank, all parts of a rank with the same `sequence`, `last` set
    on the final one.
    """

    worker: int
    rank: int
    sequence: int
    block_size: int
    hashes: bytes
    last: bool = True


class WorkerLoad(msgspec.Struct, array_like=True, gc=False):
    """Load of one engine of a worker: sent when it changes (every 10 ms at most) and once a second.

    Each message replaces the one before, so the next one makes up for a lost one.
    """

    worker: int
    rank: int
    running: int
    """requests in the engine's batch, as the engine reports it"""
    waiting: int
    """requests that wait for a place in the batch"""
    prefill_blocks: int
    """prompt blocks to be computed (cached ones not counted) of requests without a token so far"""
    decode_blocks: int
    """blocks, prompt included, of all requests accepted and not finished"""
    kv_blocks: int
    """size of the KV cache; 0: unknown"""
    kv_usage: float
    """part of the KV cache that requests hold, 0 to 1"""
    prefix_queries: int
    """prompt tokens looked up in the prefix cache since the start"""
    prefix_hits: int
    """prompt tokens found in the prefix cache since the start"""
    accepted: list[str]
    """ids of the requests accepted since the last message"""
    kv_sequence: int
    """the last `KvEvents.sequence` sent for this cache; 0: none yet"""
    kv_block_size: int
    kv_events: bool
    """the engine emits KV events"""

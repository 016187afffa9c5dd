"""What workers tell of their KV caches and their load: messages on the topics `kv_events` and `load`.

A worker is one process; `rank` tells its data-parallel engines apart, each of which has a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec


class BlocksStored(NamedTuple):
    """An engine has put full blocks into its prefix cache, one behind the other. `hashes` are the engine's own names."""

    hashes: Sequence[int]
    parent: int | None
    """the engine's name of the block before the first; None: the first begins a prompt"""
    token_ids: Sequence[int]
    """of all the blocks: `len(hashes) * block_size`"""
    block_size: int
    salt: str = ""
    """what else decides on equality: the LoRA adapter, a cache salt, images; empty for plain text"""


class BlocksRemoved(NamedTuple):
    """Blocks were evicted, by the engine's names. One that was stored twice is there until it is removed twice."""

    hashes: Sequence[int]


class BlocksCleared(NamedTuple):
    """The prefix cache is empty."""


EngineEvent = BlocksStored | BlocksRemoved | BlocksCleared


class Change(msgspec.Struct, array_like=True, gc=False):
    """Blocks that appeared in a cache or left it; `hashes` as `hashing.pack` gives them."""

    stored: bool
    hashes: bytes


class KvEvents(msgspec.Struct, array_like=True, gc=False):
    """Changes of one cache in their order. `sequence` counts its messages from 1: a gap means that one was lost."""

    worker: int
    rank: int
    sequence: int
    changes: list[Change]


class SnapshotRequest(msgspec.Struct):
    """Ask a worker (its endpoint `kv_snapshot`) for all blocks it has."""


class KvSnapshot(msgspec.Struct, array_like=True, gc=False):
    """A part of what a cache holds after message `sequence`. A snapshot is a stream of these: for each rank one or more,
    all parts of a rank with the same `sequence`, `last` on its final one."""

    worker: int
    rank: int
    sequence: int
    block_size: int
    hashes: bytes
    last: bool = True


class WorkerLoad(msgspec.Struct, array_like=True, gc=False):
    """What one engine of a worker does now: sent when it changes (every 10 ms at most) and once a second.

    Each message replaces the one before, so that a lost one is made up by the next.
    """

    worker: int
    rank: int
    running: int
    """requests in the engine's batch, as the engine says"""
    waiting: int
    """requests that wait for a place in it"""
    prefill_blocks: int
    """prompt blocks to be computed (cached ones not counted) of requests without a token so far"""
    decode_blocks: int
    """blocks, prompt included, of all requests accepted and not finished"""
    kv_blocks: int
    """size of the KV cache; 0: unknown"""
    kv_usage: float
    """part of it that requests hold, 0 to 1"""
    prefix_queries: int
    """prompt tokens looked up in the prefix cache since the start"""
    prefix_hits: int
    """those that were found there"""
    accepted: list[str]
    """ids of the requests accepted since the last message"""
    kv_sequence: int
    """the last `KvEvents.sequence` sent for this cache; 0: none yet"""
    kv_block_size: int
    kv_events: bool
    """whether the engine tells its KV events"""

"""Messages between the Processor and the Router, and what a custom scoring function gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

KvMode = Literal["kv", "kv-load", "approx-kv"]
"""kv: prefix hits, known from KV events, against load; approx-kv: the same with prefix hits estimated from the prompts
sent to each cache; kv-load: the emptiest KV cache"""


class RouteRequest(msgspec.Struct, omit_defaults=True):
    request_id: str
    prompt_tokens: int
    block_size: int
    """of the hashes"""
    hashes: bytes
    """the prompt's block hashes, as `hashing.pack` gives them"""
    mode: KvMode | None = None
    """None, here and in the next two: the router's own setting"""
    temperature: float | None = None
    overlap_credit: float | None = None
    exclude: list[int] = []
    """workers that have just refused the request"""


class Route(msgspec.Struct, array_like=True):
    worker: int
    rank: int
    """data-parallel engine of the worker"""
    ranks: int
    """number of the worker's data-parallel engines"""
    overlap_blocks: int
    """blocks of the prompt that are expected in the cache"""
    block_size: int
    """of the worker's cache; 0: unknown"""


class Candidate(NamedTuple):
    """One cache that could take the request, for a custom scoring function. Blocks are KV blocks, `kv_usage` is 0 to 1."""

    worker: int
    rank: int
    overlap_blocks: int
    prefill_blocks: float
    """prompt blocks still to be computed there, of all requests without a token so far"""
    decode_blocks: float
    """blocks of all its requests"""
    running: int
    waiting: int
    kv_blocks: int
    kv_usage: float


Score = Callable[[RouteRequest, Candidate], float]
"""Return the score of a candidate; the lowest wins."""

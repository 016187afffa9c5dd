"""The question to the router and its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import msgspec

KvMode = Literal["kv", "kv-load", "approx-kv"]
"""kv: by what the caches hold, as their events tell, against load; approx-kv: by what was sent where; kv-load: the
emptiest KV cache"""
KV_MODES: tuple[str, ...] = get_args(KvMode)


class RouteRequest(msgspec.Struct, omit_defaults=True):
    request_id: str
    prompt_tokens: int
    block_size: int
    """of the hashes"""
    hashes: bytes
    """the prompt's block hashes, as `hashing.pack` gives them"""
    mode: KvMode | None = None
    """None: the router's own, as are the next two"""
    temperature: float | None = None
    overlap_credit: float | None = None
    exclude: list[int] = []
    """workers that have just refused"""


class Route(msgspec.Struct, array_like=True):
    worker: int
    rank: int
    """data-parallel engine of the worker"""
    ranks: int
    """how many it has"""
    overlap_blocks: int
    """blocks of the prompt that are expected in its cache"""
    block_size: int
    """of the worker's cache; 0: unknown"""


class Candidate(NamedTuple):
    """One cache that could take the request, for a custom score. Blocks are KV blocks, `kv_usage` is 0 to 1."""

    worker: int
    rank: int
    overlap_blocks: int
    prefill_blocks: float
    """to be computed there, by all requests without a token so far"""
    decode_blocks: float
    """of all its requests"""
    running: int
    waiting: int
    kv_blocks: int
    kv_usage: float


Score = Callable[[RouteRequest, Candidate], float]
"""The lowest wins."""

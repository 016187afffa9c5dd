"""The best hit rate that a prefix cache can have for a trace, whatever the router does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.load import percentile
from benchmarks.replay.trace import Request


class Chains:
    """Numbers of blocks in their context: one for each different chain of hash ids from the beginning of a prompt."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def of(self, hash_ids: Sequence[int]) -> list[int]:
        found, parent = [], -1
        for hash_id in hash_ids:
            parent = self._numbers.setdefault((parent, hash_id), len(self._numbers))
            found.append(parent)
        return found


class Cache:
    """An LRU cache of prompts. `capacity` in blocks; None: no limit.

    A partial block holds as many tokens as the longest prompt that ended in it. Of one prompt the last blocks are evicted
    first, as in engines: a block is of no use without those before it. Requests count as computed when they arrive.
    """

    def __init__(self, block: int, capacity: int | None = None) -> None:
        self._block = block
        self._capacity = capacity
        self._chains = Chains()
        self._held: OrderedDict[int, int] = OrderedDict()  # block -> its tokens

    def add(self, request: Request) -> int:
        """Return how many of the prompt's tokens are cached, then add all of them, as far as they fit."""
        chain, hit = self._chains.of(request.hash_ids), 0
        sizes = [min(self._block, request.input_length - self._block * at) for at in range(len(chain))]
        for node, size in zip(chain, sizes, strict=True):
            held = self._held.get(node, 0)
            hit += min(held, size)
            if held < size:
                break
        for node, size in zip(reversed(chain), reversed(sizes), strict=True):
            self._held[node] = max(size, self._held.get(node, 0))
            self._held.move_to_end(node)
        while self._capacity is not None and len(self._held) > self._capacity:
            self._held.popitem(last=False)
        return hit

    @property
    def blocks(self) -> int:
        return len(self._held)

    @property
    def tokens(self) -> int:
        return sum(self._held.values())


def hit_rate(requests: Iterable[Request], block: int, capacity: int | None = None) -> float:
    """Return the share of all prompt tokens that one cache for the whole trace has when they are requested."""
    cache = Cache(block, capacity)
    hit = asked = 0
    for request in requests:
        hit += cache.add(request)
        asked += request.input_length
    return hit / asked if asked else 0.0


@dataclass(frozen=True)
class Statistics:
    requests: int
    seconds: float
    input_tokens: dict[str, float]
    output_tokens: dict[str, float]
    blocks: int
    """number of different blocks: the working set"""
    tokens: int
    """tokens in these blocks"""
    oracle: float
    """hit rate of one cache without a limit"""
    bounded: dict[int, float]
    """hit rate of one LRU cache by its size in tokens"""

    @property
    def requests_per_s(self) -> float:
        return arrival_rate(self.requests, self.seconds)


def arrival_rate(requests: int, seconds: float) -> float:
    """Return the requests a second between the first and the last; infinite if all arrive at the same time."""
    return (requests - 1) / seconds if seconds else float("inf")


def describe(requests: Sequence[Request], block: int, cache_tokens: Sequence[int]) -> Statistics:
    """Return the statistics of a trace.

    Without `cache_tokens` they include caches of 1, 5, 10, 25 and 50 % of the working set.
    """
    cache = Cache(block)
    hit = sum(cache.add(request) for request in requests)
    sizes = list(cache_tokens) or [max(cache.blocks * share // 100, 1) * block for share in (1, 5, 10, 25, 50)]
    return Statistics(
        requests=len(requests),
        seconds=(requests[-1].timestamp - requests[0].timestamp) / 1e3 if requests else 0.0,
        input_tokens=spread([request.input_length for request in requests]),
        output_tokens=spread([request.output_length for request in requests]),
        blocks=cache.blocks,
        tokens=cache.tokens,
        oracle=hit / (sum(request.input_length for request in requests) or 1),
        bounded={size: hit_rate(requests, block, max(size // block, 1)) for size in sizes},
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean and percentiles; an empty dict for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    shares = {name: float(percentile(ordered, share)) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {"mean": sum(ordered) / len(ordered), **shares, "max": float(ordered[-1])}

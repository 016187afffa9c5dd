"""Cost of running a request on a worker, in KV blocks; the lowest cost wins.

    cost = prefill_load_scale * max(prefill + prompt - credit * overlap, 0) + decode + prompt

prefill: prompt blocks that the worker still has to compute; decode: blocks of the requests it runs; prompt: the
request's own blocks; overlap: those of them that the worker has in its prefix cache. This is the cost function of
Dynamo 0.4 to 1.6 (its docs/components/router), with a different default scale.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dynamo.kv_router.worker_state import CacheState

PREFILL_LOAD_SCALE = 8.0
"""A block to be computed delays all requests of the worker once, by all its tokens; a block that is held is read once a
step. Dynamo's value is 1. Simulated (benchmarks/replay) over conversations, agents and documents, 8 found 90 to 98 % of
the possible hits, 1 found 60 to 84 %; beyond 16, load gathers on few workers and tokens come more slowly."""


class Weights(NamedTuple):
    """`temperature` 0 takes the cheapest worker; a higher one spreads: softmax over costs scaled to 0..1."""

    prefill_load_scale: float = PREFILL_LOAD_SCALE
    overlap_credit: float = 1.0
    temperature: float = 0.0


def costs(
    prompt_blocks: int, overlaps: Mapping[int, int], caches: Iterable[CacheState], weights: Weights
) -> list[float]:
    """Return the cost of running a request on each of these caches; `overlaps` are by slot."""
    scale, credit, _ = weights
    prompt = float(prompt_blocks)  # Python adds and multiplies floats faster than a float and an int
    overlap_of = overlaps.get
    found: list[float] = []
    for cache in caches:
        to_compute = cache.prefill_blocks + prompt - credit * overlap_of(cache.slot, 0)
        if to_compute < 0.0:
            to_compute = 0.0
        found.append(scale * to_compute + cache.decode_blocks + prompt)
    return found


def draw(scores: Sequence[float], temperature: float = 0.0) -> int:
    """Return the position of the lowest score, at random among equal ones; with a temperature, draw by softmax.

    The softmax is over the negated scores, scaled to 0..1 before.
    """
    lowest = min(scores)
    if temperature <= 0:
        return random.choice([position for position, score in enumerate(scores) if score == lowest])
    span = (max(scores) - lowest) or 1.0
    chances = [math.exp((lowest - score) / span / temperature) for score in scores]
    return random.choices(range(len(scores)), chances)[0]

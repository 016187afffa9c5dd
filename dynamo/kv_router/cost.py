"""What it costs to run a request on a worker, in KV blocks; the lowest cost wins.

    cost = prefill_load_scale * max(prefill + prompt - credit * overlap, 0) + decode + prompt

prefill: prompt blocks that the worker has still to compute; decode: blocks of the requests it runs; prompt: the
request's own blocks; overlap: those of them that the worker has in its prefix cache. This is the cost function of
Dynamo 0.4 to 1.6 (its docs/components/router), with a scale of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from heapq import heappush, heapreplace
from operator import itemgetter
from typing import NamedTuple

from dynamo.kv_router.index import Match, slots

PREFILL_LOAD_SCALE = 8.0
"""A block that must be computed delays everybody on the worker once, by all its tokens; one that is held is read once a
step. 1 is Dynamo's. Simulated (benchmarks/replay) over conversations, agents and documents, 8 found 90 to 98 % of the
hits that there were to find, 1 found 60 to 84 %; beyond 16, load gathers on few workers and tokens come more slowly."""


STALE = 8
"""Entries of the heap of loads for each cache, before it is made anew."""


_NONE = ((math.inf, 0), (math.inf, 0))  # so that a heap has three entries


class Weights(NamedTuple):
    """`temperature` 0 takes the cheapest worker, more spreads: softmax over costs scaled to 0..1."""

    prefill_load_scale: float = PREFILL_LOAD_SCALE
    overlap_credit: float = 1.0
    temperature: float = 0.0


class Loads:
    """Load of every cache by slot, in blocks. `weighed` is `scale * prefill + decode`, what decides where nothing is
    cached; `scale` and `credit` are the first two of `Weights`."""

    def __init__(self, scale: float = PREFILL_LOAD_SCALE, credit: float = 1.0) -> None:
        self.scale, self._worth = scale, scale * credit
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.weighed: list[float] = []
        self._heap = list(_NONE)  # of `weighed` and slots; for each slot one that is not more than true

    def set(self, slot: int, prefill: float, decode: float) -> None:
        weighed = self.scale * prefill + decode
        if slot >= len(self.weighed):
            for column in (self.prefill, self.decode, self.weighed):
                column += [math.inf] * (slot + 1 - len(column))
        fell = weighed < self.weighed[slot]
        self.prefill[slot], self.decode[slot], self.weighed[slot] = prefill, decode, weighed
        if fell and len(self._heap) < STALE * len(self.weighed):
            heappush(self._heap, (weighed, slot))
        elif fell:
            self._heap = [*sorted((load, slot) for slot, load in enumerate(self.weighed)), *_NONE]

    def add(self, slot: int, prefill: float, decode: float) -> None:
        self.prefill[slot] += prefill
        self.decode[slot] += decode
        self.weighed[slot] += self.scale * prefill + decode

    def _lowest(self) -> tuple[float, int]:
        """The least of `weighed`, and a slot that has it."""
        heap, weighed = self._heap, self.weighed
        load, slot = heap[0]
        while load != weighed[slot]:
            heapreplace(heap, (weighed[slot], slot))
            load, slot = heap[0]
        return load, slot

    def limit(self, prompt: int, depth: int, caches: int) -> float:
        """With more of `weighed` a cache is not the cheapest for a prompt of so many blocks, not even if it holds all
        of it: `caches` hold `depth` blocks of it."""
        load, slot = self._lowest()
        return load + self._worth * (prompt - depth if caches >> slot & 1 else prompt)

    def cheapest(self, matches: Sequence[Match], caches: int) -> tuple[int, int]:
        """The slot among `caches`, not 0, that has the least of `costs`, and its overlap; equal ones share by lot.

        `matches`: shortest first, of these caches, none twice. With a credit of 1 at most an overlap is worth no more
        than the prompt: caches of one match differ by their load only, and each match is asked for its least loaded one.
        """
        heap, weighed, worth_of_block = self._heap, self.weighed, self._worth
        idlest, idlest_slot = heap[0]
        if idlest != weighed[idlest_slot]:
            idlest, idlest_slot = self._lowest()
        lowest, group, load, overlap = math.inf, 0, 0.0, 0
        for blocks, holders in reversed(matches):
            worth = worth_of_block * blocks
            if idlest - worth > lowest:
                continue  # none of them can be cheaper
            least = idlest if holders >> idlest_slot & 1 else self._least(holders)
            cost = least - worth
            if cost < lowest or (cost == lowest and random.random() < 0.5):
                lowest, group, load, overlap = cost, holders, least, blocks
        if idlest <= lowest:  # by one that is in no match, if by any
            for _, holders in matches:
                caches ^= holders
            least = idlest if caches >> idlest_slot & 1 else self._least(caches)
            if least < lowest or (least == lowest and random.random() < 0.5):
                group, load, overlap = caches, least, 0
        if not group & (group - 1):
            return group.bit_length() - 1, overlap
        if group >> idlest_slot & 1 and heap[1][0] != load != heap[2][0]:
            return idlest_slot, overlap
        members, loads = _members(group), _picker(group)(weighed)
        return random.choice([slot for slot, one in zip(members, loads, strict=True) if one == load]), overlap

    def _least(self, caches: int) -> float:
        if caches & (caches - 1):
            return min(_picker(caches)(self.weighed))
        return self.weighed[caches.bit_length() - 1] if caches else math.inf


def overlaps(matches: Sequence[Match]) -> dict[int, int]:
    """Blocks by slot, for those that have any."""
    return {slot: blocks for blocks, caches in matches for slot in slots(caches)}


def costs(prompt: int, matches: Sequence[Match], loads: Loads, caches: int, weights: Weights) -> dict[int, float]:
    """The cost of each cache of a bit set, by slot."""
    scale, credit, _ = weights
    prefill, decode, overlap = loads.prefill, loads.decode, overlaps(matches)
    return {
        slot: scale * max(prefill[slot] + prompt - credit * overlap.get(slot, 0), 0.0) + decode[slot] + prompt
        for slot in slots(caches)
    }


@lru_cache(4096)
def _members(caches: int) -> tuple[int, ...]:
    return tuple(slots(caches))


@lru_cache(4096)
def _picker(caches: int) -> Callable[[list[float]], tuple[float, ...]]:
    return itemgetter(*_members(caches))


def draw(found: dict[int, float], temperature: float) -> int:
    """A slot by softmax of the negated costs, scaled to 0..1 before; temperature 0 takes the lowest, by lot if several."""
    lowest, highest = min(found.values()), max(found.values())
    if temperature <= 0:
        return random.choice([slot for slot, cost in found.items() if cost == lowest])
    span = (highest - lowest) or 1.0
    chances = [math.exp((lowest - cost) / span / temperature) for cost in found.values()]
    return random.choices(list(found), chances)[0]

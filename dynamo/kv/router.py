"""`KvRouter`: chooses the worker for a request by what the caches hold and what they have to do. No network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dynamo.errors import NoInstancesError
from dynamo.kv.caches import Cache, Caches
from dynamo.kv.cost import Loads, Weights, costs, draw, overlaps
from dynamo.kv.hashing import BlockHash, view
from dynamo.kv.index import Match, slots
from dynamo.kv.route import Candidate, KvMode, Route, RouteRequest, Score

EXPECTED_S = 30.0
"""How long a placed prompt is taken for cached before events confirm it; it may wait for a place in the batch."""
DEFAULT_KV_BLOCKS = 16384


class KvRouter:
    """`caches` gets the workers' messages, `route` places requests, `tick` is called about once a second."""

    def __init__(
        self,
        mode: KvMode = "kv",
        weights: Weights = Weights(),
        score: Score | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode: KvMode = mode
        self.weights, self.score, self._clock = weights, score, clock
        self.caches = Caches(Loads(weights.prefill_load_scale, weights.overlap_credit))
        self._usual = score is None and weights.temperature <= 0 and weights.overlap_credit <= 1
        # by first block to be computed, then by slot: prompts placed there, and until when they count
        self._expected: dict[BlockHash, dict[int, tuple[Sequence[BlockHash], float]]] = {}

    def leave(self, worker: int) -> None:
        for slot in self.caches.leave(worker):
            self._forget(slot, self._clock())

    def tick(self) -> None:
        now_s = self._clock()
        self.caches.tick(now_s)
        self._forget(None, now_s)

    def route(self, request: RouteRequest) -> Route:
        """Raises NoInstancesError when no worker is there that is not excluded."""
        caches = self.caches
        candidates = caches.alive
        for worker in request.exclude:
            for cache in caches.of(worker):
                candidates &= ~(1 << cache.slot)
        if not candidates:
            raise NoInstancesError("the router knows no worker", hint="it is starting, restarting or was not deployed")
        now_s, mode, block_size = self._clock(), request.mode or self.mode, caches.block_size
        blocks = request.prompt_tokens // request.block_size or 1
        prompt = view(request.hashes if block_size == request.block_size or not block_size else b"")
        blind = candidates if mode == "approx-kv" else caches.blind & candidates
        usual = self._usual and mode != "kv-load" and request.temperature is None and request.overlap_credit is None
        loads = caches.loads if usual and not request.exclude else None
        matches = caches.index.matches(prompt, candidates, blind, caches.routed.index, loads)
        if self._expected and prompt:
            matches = self._with_expected(matches, prompt, candidates, now_s)
        if usual:
            slot, overlap = caches.loads.cheapest(matches, candidates)
        else:
            slot = self._choose(request, blocks, matches, candidates, mode)
            overlap = overlaps(matches).get(slot, 0)
        cache = caches.slots[slot]
        caches.place(cache, request.request_id, blocks - overlap, blocks, now_s)
        if mode != "kv-load":  # the prompt's blocks will be there soon
            if blind >> slot & 1:
                caches.routed.add(slot, prompt, now_s, _kv_blocks(cache))
            elif overlap < len(prompt):
                self._expected.setdefault(prompt[overlap], {})[slot] = (prompt, now_s + EXPECTED_S)
        return Route(cache.worker, cache.rank, len(cache.ranks), overlap, block_size)

    def _with_expected(
        self, matches: list[Match], prompt: Sequence[BlockHash], candidates: int, now_s: float
    ) -> list[Match]:
        """The matches with what prompts that were placed will add."""
        expected, end = self._expected, len(prompt)
        first = [prompt[0]] if prompt[0] in expected else []
        for blocks, _ in matches:  # whoever holds so many blocks computes the next one first
            if blocks < end and prompt[blocks] in expected:
                first.append(prompt[blocks])
        if not first:
            return matches
        least = {
            slot: common(prompt, placed)
            for hash in first
            for slot, (placed, until_s) in expected[hash].items()
            if until_s > now_s and candidates >> slot & 1
        }
        return _raised(matches, least)

    def _choose(self, request: RouteRequest, blocks: int, matches: list[Match], candidates: int, mode: KvMode) -> int:
        if self.score is not None:
            found = overlaps(matches)
            scores = {
                slot: self.score(request, self._candidate(slot, found.get(slot, 0))) for slot in slots(candidates)
            }
            return draw(scores, 0)
        if mode == "kv-load":
            return draw({slot: self._fullness(slot) for slot in slots(candidates)}, 0)
        weights = self.weights
        if request.temperature is not None:
            weights = weights._replace(temperature=request.temperature)
        if request.overlap_credit is not None:
            weights = weights._replace(overlap_credit=request.overlap_credit)
        return draw(costs(blocks, matches, self.caches.loads, candidates, weights), weights.temperature)

    def _fullness(self, slot: int) -> float:
        return self.caches.loads.decode[slot] / _kv_blocks(self.caches.slots[slot])

    def _candidate(self, slot: int, overlap: int) -> Candidate:
        cache, loads = self.caches.slots[slot], self.caches.loads
        told = cache.load
        running, waiting, usage = (told.running, told.waiting, told.kv_usage) if told is not None else (0, 0, 0.0)
        return Candidate(
            worker=cache.worker,
            rank=cache.rank,
            overlap_blocks=overlap,
            prefill_blocks=loads.prefill[slot],
            decode_blocks=loads.decode[slot],
            running=running,
            waiting=waiting,
            kv_blocks=_kv_blocks(cache),
            kv_usage=usage,
        )

    def _forget(self, gone: int | None, now_s: float) -> None:
        """Prompts expected in a slot that is free now, those whose time is over, those that events have confirmed."""
        holders = self.caches.index.holders
        for first, expected in list(self._expected.items()):
            for slot, (prompt, until_s) in list(expected.items()):
                if slot == gone or until_s <= now_s or holders.get(prompt[-1], 0) >> slot & 1:
                    del expected[slot]
            if not expected:
                del self._expected[first]


def _raised(matches: list[Match], least: dict[int, int]) -> list[Match]:
    """The same matches with at least so many blocks for some slots, shortest first as before."""
    found: list[Match] = []
    for blocks, caches in matches:
        for slot, expected in list(least.items()):
            if caches >> slot & 1:
                if expected > blocks:
                    caches ^= 1 << slot
                else:
                    del least[slot]
        if caches:
            found.append((blocks, caches))
    found += [(blocks, 1 << slot) for slot, blocks in least.items()]
    return sorted(found)


def common(one: Sequence[BlockHash], other: Sequence[BlockHash]) -> int:
    """Blocks that two prompts have in common; equal hashes mean equal prefixes, so bisection finds the end."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _kv_blocks(cache: Cache) -> int:
    return (cache.load.kv_blocks if cache.load is not None else 0) or DEFAULT_KV_BLOCKS

"""`KvRouter`: chooses the worker for a request by what the caches hold and what they have to do. No network."""

from __future__ import annotations

import time
from collections.abc import Callable

from dynamo.errors import NoInstancesError
from dynamo.kv_router.cost import Loads, Weights, costs, draw, overlaps
from dynamo.kv_router.hashing import view
from dynamo.kv_router.index import Match, slots
from dynamo.kv_router.messages import Candidate, KvMode, Route, RouteRequest, Score
from dynamo.kv_router.pending_prefixes import EXPECTED_S
from dynamo.kv_router.worker_state import Cache, WorkerState

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
        self.caches = WorkerState(Loads(weights.prefill_load_scale, weights.overlap_credit))
        self._usual = score is None and weights.temperature <= 0 and 0 <= weights.overlap_credit <= 1

    def tick(self) -> None:
        self.caches.tick(self._clock())

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
        if prompt and caches.expected.prompts:
            matches = caches.expected.added(matches, prompt, candidates, now_s)
        if usual:
            slot, overlap = caches.loads.cheapest(matches, candidates)
        else:
            slot = self._choose(request, blocks, matches, candidates, mode)
            overlap = overlaps(matches).get(slot, 0)
        cache = caches.slots[slot]
        caches.place(cache, request.request_id, blocks - overlap, blocks, now_s)
        if prompt and mode != "kv-load":  # its blocks will be there soon
            if blind >> slot & 1:
                caches.routed.add(slot, prompt, now_s, _kv_blocks(cache))
            elif overlap < len(prompt):
                caches.expected.add(slot, prompt, overlap, now_s + EXPECTED_S)
        return Route(cache.worker, cache.rank, len(cache.ranks), overlap, block_size)

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


def _kv_blocks(cache: Cache) -> int:
    return (cache.load.kv_blocks if cache.load is not None else 0) or DEFAULT_KV_BLOCKS

"""`KvRouter`: chooses the worker for a request by the contents of the KV caches and the load. No network code."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from dynamo.errors import NoInstancesError
from dynamo.kv_router.cost import Weights, costs, draw
from dynamo.kv_router.hashing import view
from dynamo.kv_router.messages import Candidate, KvMode, Route, RouteRequest, Score
from dynamo.kv_router.pending_prefixes import PENDING_PROMPT_S
from dynamo.kv_router.worker_state import CacheState, WorkerState

DEFAULT_KV_BLOCKS = 16384
"""Size assumed for a KV cache whose worker has not reported it."""


class KvRouter:
    """`state` takes the workers' messages, `route` places requests, `tick` is called about once a second."""

    def __init__(
        self,
        mode: KvMode = "kv",
        weights: Weights = Weights(),
        score: Score | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode: KvMode = mode
        self.weights = weights
        self.score = score
        self.state = WorkerState()
        self._clock = clock

    def tick(self) -> None:
        """Remove what has expired."""
        self.state.expire(self._clock())

    def route(self, request: RouteRequest) -> Route:
        """Choose a cache for a request and count the request there.

        Raises NoInstancesError if there is no worker, or none that is not excluded.
        """
        state = self.state
        candidates = state.caches
        if request.exclude:
            candidates = [cache for cache in candidates if cache.worker not in request.exclude]
        if not candidates:
            raise NoInstancesError("the router knows no worker", hint="it is starting, restarting or was not deployed")
        now_s = self._clock()
        mode = request.mode or self.mode
        # hashes of another block size are found in no cache
        prompt = view(request.hashes if state.block_size in (request.block_size, 0) else b"")
        prompt_blocks = request.prompt_tokens // request.block_size or 1
        overlaps = state.overlaps(prompt, approximate=mode == "approx-kv", now_s=now_s)
        cache = candidates[self._choose(request, mode, candidates, overlaps, prompt_blocks)]
        overlap = overlaps.get(cache.slot, 0)
        state.place(cache, request.request_id, prompt_blocks - overlap, prompt_blocks, now_s)
        if prompt and mode != "kv-load":
            if mode == "approx-kv" or cache.slot in state.without_events:
                state.approximate.add(cache.slot, prompt, now_s, _kv_blocks(cache))
            elif overlap < len(prompt):
                state.pending.add(cache.slot, prompt, overlap, now_s + PENDING_PROMPT_S)
        return Route(cache.worker, cache.rank, state.rank_count(cache.worker), overlap, state.block_size)

    def _choose(
        self,
        request: RouteRequest,
        mode: KvMode,
        candidates: list[CacheState],
        overlaps: Mapping[int, int],
        prompt_blocks: int,
    ) -> int:
        """Return the position of the best candidate."""
        if self.score is not None:
            score = self.score
            return draw([score(request, _candidate(cache, overlaps.get(cache.slot, 0))) for cache in candidates])
        if mode == "kv-load":
            return draw([cache.decode_blocks / _kv_blocks(cache) for cache in candidates])
        weights = self.weights
        if request.temperature is not None:
            weights = weights._replace(temperature=request.temperature)
        if request.overlap_credit is not None:
            weights = weights._replace(overlap_credit=request.overlap_credit)
        return draw(costs(prompt_blocks, overlaps, candidates, weights), weights.temperature)


def _candidate(cache: CacheState, overlap: int) -> Candidate:
    load = cache.load
    return Candidate(
        worker=cache.worker,
        rank=cache.rank,
        overlap_blocks=overlap,
        prefill_blocks=cache.prefill_blocks,
        decode_blocks=cache.decode_blocks,
        running=load.running if load is not None else 0,
        waiting=load.waiting if load is not None else 0,
        kv_blocks=_kv_blocks(cache),
        kv_usage=load.kv_usage if load is not None else 0.0,
    )


def _kv_blocks(cache: CacheState) -> int:
    return (cache.load.kv_blocks if cache.load is not None else 0) or DEFAULT_KV_BLOCKS

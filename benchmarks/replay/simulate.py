"""Replay in virtual time, without processes: the mock engine's scheduler and caches, and the real router.

Hundreds of workers on one core, minutes of traffic in seconds, and the same result each time: to try a routing policy
before it is measured. The cost of the processes themselves is left out, and workers' messages arrive immediately.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from itertools import count
from typing import get_args

from benchmarks.processes import StartError
from benchmarks.replay.capacity import Engines
from benchmarks.replay.client import Answer, Due, Replay
from benchmarks.replay.prompts import Prompts
from dynamo.engines.mock.block_pool import BlockPool
from dynamo.engines.mock.scheduler import ScheduledSequence, Scheduler
from dynamo.engines.mock.timing import step_ms
from dynamo.kv_router.block_map import BlockMap
from dynamo.kv_router.events import KvEvents, KvSnapshot, WorkerLoad
from dynamo.kv_router.hashing import block_hashes, pack
from dynamo.kv_router.messages import KvMode, RouteRequest
from dynamo.kv_router.router import KvRouter

KV_MODES: tuple[str, ...] = get_args(KvMode)
MODES = ("round-robin", "random", "power-of-two", "least-loaded", *KV_MODES)


class _Request(ScheduledSequence):
    """One request of the trace, in an engine."""

    __slots__ = ("answer", "expected_hit", "first_token")

    def __init__(self, prompt: list[int], block: int, answer: Answer, first_token: int) -> None:
        super().__init__(prompt, block_hashes(prompt, block))
        self.answer = answer
        self.first_token = first_token
        self.expected_hit = 0


class _Worker:
    def __init__(self, id: int, engines: Engines, simulation: Simulation) -> None:
        self.id = id
        self._engines = engines
        self._simulation = simulation
        self.scheduler: Scheduler[_Request] = Scheduler(
            BlockPool(engines.blocks, engines.block, events=True),
            batched_tokens=engines.batched_tokens,
            sequences=engines.max_sequences,
        )
        self._block_map = BlockMap(engines.block)
        self._sequence = 0
        self._requests: dict[_Request, None] = {}
        self._accepted: list[str] = []
        self._stepping = False

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: _Request, name: str) -> None:
        self._requests[request] = None
        self._accepted.append(name)
        self.scheduler.add(request)
        if not self._stepping:
            self._begin()
        self._report()

    def _begin(self) -> None:
        step = self.scheduler.schedule()
        self._stepping = step is not None
        if step is not None:
            read = min(self.scheduler.kv_tokens / self._engines.tokens, 1.0)
            self._simulation.after(step_ms(step, read) / self._engines.speedup / 1e3, self._end)

    def _end(self) -> None:
        self.scheduler.complete(self._emit)
        self._begin()
        self._report()

    def _emit(self, request: _Request) -> bool:
        answer, now_s = request.answer, self._simulation.now_s
        request.output.append(request.first_token + len(request.output))
        if len(request.output) == 1:
            answer.ttft_s = now_s - answer.due_s
            answer.cached_tokens = request.cached_tokens
        if len(request.output) < answer.request.output_length:
            return False
        answer.end_s = now_s - answer.due_s
        del self._requests[request]
        return True

    def _report(self) -> None:
        state = self._simulation.router.state
        self._block_map.apply(self.scheduler.pool.drain_events())
        if changes := self._block_map.changes():
            self._sequence += 1
            state.apply_events(KvEvents(self.id, 0, self._sequence, changes))
        state.apply_load(self._load())

    def _load(self) -> WorkerLoad:
        block, scheduler = self._engines.block, self.scheduler
        new = [-(-(len(r.prompt) - r.expected_hit) // block) for r in self._requests if not r.output]
        accepted = self._accepted
        self._accepted = []
        return WorkerLoad(
            worker=self.id,
            rank=0,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            prefill_blocks=sum(new),
            decode_blocks=sum(-(-r.length // block) for r in self._requests),
            kv_blocks=scheduler.pool.usable,
            kv_usage=scheduler.pool.usage,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            accepted=accepted,
            kv_sequence=self._sequence,
            kv_block_size=block,
            kv_events=True,
        )


class Simulation:
    def __init__(self, engines: Engines, mode: str, router: KvRouter | None = None) -> None:
        self.now_s = 0.0
        self.router = router or KvRouter(clock=lambda: self.now_s)
        self._engines = engines
        self._mode = mode
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._random = random.Random(1)
        self.workers = [_Worker(id, engines, self) for id in range(engines.workers)]
        for worker in self.workers:
            self.router.state.join(worker.id)
            self.router.state.apply_snapshot(worker.id, [KvSnapshot(worker.id, 0, 0, engines.block, b"")])

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + seconds, next(self._order), work))

    def run(self, due: Sequence[Due], prompts: Prompts) -> Replay:
        answers = [Answer(at_s, request, late_s=0.0) for at_s, request in due]
        for number, answer in enumerate(answers):
            self.after(answer.due_s, lambda number=number, answer=answer: self._arrive(number, answer, prompts))  # type: ignore[misc]
        ticked = 0.0
        while self._queue:
            self.now_s, _, work = heapq.heappop(self._queue)
            work()
            if self.now_s - ticked > 1:
                ticked = self.now_s
                self.router.tick()
        return Replay(answers, self.now_s, 0.0)

    def _arrive(self, number: int, answer: Answer, prompts: Prompts) -> None:
        request = _Request(prompts.tokens(answer.request), self._engines.block, answer, (1 + number) << 16)
        worker = self._choose(number, request)
        worker.add(request, str(number))

    def _choose(self, number: int, request: _Request) -> _Worker:
        mode = self._mode
        if mode in KV_MODES:
            kv_mode: KvMode = mode  # type: ignore[assignment]
            question = RouteRequest(
                str(number), len(request.prompt), self._engines.block, pack(request.hashes), mode=kv_mode
            )
            route = self.router.route(question)
            request.expected_hit = route.overlap_blocks * self._engines.block
            return self.workers[route.worker]
        if mode == "round-robin":
            return self.workers[number % len(self.workers)]
        if mode == "random":
            return self._random.choice(self.workers)
        if mode == "least-loaded":
            return min(self._random.sample(self.workers, len(self.workers)), key=len)
        if mode == "power-of-two":
            return min(self._random.sample(self.workers, 2), key=len)
        raise StartError(f"unknown mode {mode!r}; modes: {', '.join(MODES)}")

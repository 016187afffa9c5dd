"""KvRouter and WorkerState: the index follows the workers whatever is lost, and requests go where they should."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dynamo.errors import NoInstancesError
from dynamo.kv_router.cost import Weights, costs
from dynamo.kv_router.events import Change, KvEvents, KvSnapshot, WorkerLoad
from dynamo.kv_router.hashing import BlockHash, block_hashes, pack
from dynamo.kv_router.index import slots_of
from dynamo.kv_router.messages import Candidate, RouteRequest
from dynamo.kv_router.pending_prefixes import PENDING_PROMPT_S, common_blocks
from dynamo.kv_router.router import KvRouter
from dynamo.kv_router.worker_state import SILENT_REQUESTS, SILENT_S, UNREPORTED_S

SIZE = 4


class Worker:
    """A worker as the router sees it, with one cache for each rank."""

    def __init__(self, id: int, ranks: int = 1) -> None:
        self.id = id
        self.held: list[set[BlockHash]] = [set() for _ in range(ranks)]
        self.sequence = [0] * ranks

    def change(self, rank: int, hashes: set[BlockHash], *, stored: bool) -> KvEvents:
        held = self.held[rank]
        held.update(hashes) if stored else held.difference_update(hashes)
        self.sequence[rank] += 1
        return KvEvents(self.id, rank, self.sequence[rank], [Change(stored, pack(sorted(hashes)))])

    def snapshot(self) -> list[KvSnapshot]:
        parts = []
        for rank, held in enumerate(self.held):
            hashes = sorted(held)
            middle = len(hashes) // 2
            parts += [
                KvSnapshot(self.id, rank, self.sequence[rank], SIZE, pack(half), last)
                for half, last in ((hashes[:middle], False), (hashes[middle:], True))
            ]
        return parts

    def load(self, rank: int = 0, **fields: object) -> WorkerLoad:
        values: dict[str, object] = {
            "running": 0, "waiting": 0, "prefill_blocks": 0, "decode_blocks": 0, "kv_blocks": 1000, "kv_usage": 0.0,
            "prefix_queries": 0, "prefix_hits": 0, "accepted": [], "kv_sequence": self.sequence[rank],
            "kv_block_size": SIZE, "kv_events": True,
        }  # fmt: skip
        return WorkerLoad(self.id, rank, **{**values, **fields})  # type: ignore[arg-type]


class Followed(RuleBasedStateMachine):
    """Caches change, messages get lost, routers and workers come and go; in the end the router knows every block."""

    @initialize()
    def begin(self) -> None:
        self.next_id = 1
        self.workers: dict[int, Worker] = {}
        self.late: list[KvEvents] = []  # sent, and not yet delivered
        self.wanted: set[int] = set()
        self.router = KvRouter()
        self.worker_joins()

    @rule()
    def worker_joins(self) -> None:
        worker = Worker(self.next_id, ranks=1 + self.next_id % 2)
        self.next_id += 1
        self.workers[worker.id] = worker
        self.router.state.join(worker.id)
        self.wanted.add(worker.id)

    @rule(data=st.data())
    def worker_leaves(self, data: st.DataObject) -> None:
        if len(self.workers) > 1:
            leaving = data.draw(st.sampled_from(sorted(self.workers)))
            del self.workers[leaving]
            self.router.state.leave(leaving)

    @rule(
        data=st.data(),
        hashes=st.sets(st.integers(1, 12), min_size=1, max_size=4),
        stored=st.booleans(),
        fate=st.sampled_from(["arrives", "arrives", "is lost", "is late"]),
    )
    def change(self, data: st.DataObject, hashes: set[int], stored: bool, fate: str) -> None:
        worker = self.workers[data.draw(st.sampled_from(sorted(self.workers)))]
        rank = data.draw(st.integers(0, len(worker.held) - 1))
        message = worker.change(rank, {BlockHash(hash) for hash in hashes}, stored=stored)
        if fate == "is late":
            self.late.append(message)
        elif fate == "arrives":
            self.deliver(message)

    def deliver(self, message: KvEvents) -> None:
        if self.router.state.apply_events(message):
            self.wanted.add(message.worker)

    @rule()
    def late_messages_arrive(self) -> None:
        late, self.late = self.late, []
        for message in late:
            self.deliver(message)

    @rule()
    def loads_arrive(self) -> None:
        for worker in self.workers.values():
            for rank in range(len(worker.held)):
                if self.router.state.apply_load(worker.load(rank)):
                    self.wanted.add(worker.id)

    @rule()
    def snapshots_arrive(self) -> None:
        wanted, self.wanted = self.wanted, set()
        for id in wanted & self.workers.keys():
            if self.router.state.apply_snapshot(id, self.workers[id].snapshot()):
                self.wanted.add(id)

    @rule()
    def router_restarts(self) -> None:
        self.router = KvRouter()
        self.wanted = set(self.workers)
        for id in self.workers:
            self.router.state.join(id)

    @invariant()
    def knows_joined_workers_only(self) -> None:
        assert set(self.router.state.workers) == set(self.workers)
        for held in self.router.state.index.holders.values():
            assert set(slots_of(held)) <= {cache.slot for cache in self.router.state.caches}

    def teardown(self) -> None:
        if not hasattr(self, "router"):
            return
        self.late_messages_arrive()
        for _ in range(3):  # what was lost at the end shows at the second load
            self.snapshots_arrive()
            self.loads_arrive()
        self.snapshots_arrive()
        for cache in self.router.state.caches:
            assert self.router.state.index.blocks(cache.slot) == self.workers[cache.worker].held[cache.rank]


TestFollowed = Followed.TestCase
TestFollowed.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def served(*workers: Worker, **options: object) -> tuple[KvRouter, Clock]:
    clock = Clock()
    router = KvRouter(clock=clock, **{"weights": Weights(1.0), **options})  # type: ignore[arg-type]
    for worker in workers:
        router.state.join(worker.id)
        router.state.apply_snapshot(worker.id, worker.snapshot())
        for rank in range(len(worker.held)):
            router.state.apply_load(worker.load(rank))
    return router, clock


def ask(tokens: list[int], id: str = "r", size: int = SIZE, **options: object) -> RouteRequest:
    return RouteRequest(id, len(tokens), size, pack(block_hashes(tokens, size)), **options)  # type: ignore[arg-type]


PROMPT = list(range(40))


def test_prefix_hits_are_weighed_against_load() -> None:
    one, two = Worker(1), Worker(2)
    one.held[0] |= set(block_hashes(PROMPT[:24], SIZE))
    router, _ = served(one, two)
    route = router.route(ask(PROMPT, "a"))
    assert (route.worker, route.overlap_blocks, route.block_size) == (1, 6, SIZE)
    router.state.apply_load(one.load(accepted=["a"], prefill_blocks=4, decode_blocks=10))
    assert router.route(ask(PROMPT, "b")).worker == 2  # 4 + 10 of load against 6 of overlap
    assert router.route(ask(PROMPT, "c", mode="kv", overlap_credit=0.0)).worker == 1  # b counts there, unreported
    assert router.route(ask(PROMPT, "d", exclude=[2])).worker == 1
    with pytest.raises(NoInstancesError):
        router.route(ask(PROMPT, "e", exclude=[1, 2]))


def test_a_placed_request_counts_until_it_is_reported_or_expires() -> None:
    worker = Worker(1)
    router, clock = served(worker)
    (cache,) = router.state.caches
    router.route(ask(PROMPT, "a"))
    assert (cache.prefill_blocks, cache.decode_blocks) == (10, 10)
    router.state.apply_load(worker.load())  # sent before it came
    assert (cache.prefill_blocks, cache.decode_blocks) == (10, 10)
    router.state.apply_load(worker.load(accepted=["a"], prefill_blocks=9, decode_blocks=10))
    assert (cache.prefill_blocks, cache.decode_blocks) == (9, 10)
    router.route(ask(PROMPT, "b"))  # its caller dies
    clock.now_s += UNREPORTED_S
    router.tick()
    assert (cache.prefill_blocks, cache.decode_blocks) == (9, 10)


def test_a_pending_prompt_counts_as_cached() -> None:
    one, two = Worker(1), Worker(2)
    router, clock = served(one, two)
    first = router.route(ask(PROMPT, "a")).worker
    longer = [*PROMPT, 7, 7, 7, 7]
    route = router.route(ask(longer, "b", exclude=[3 - first]))
    assert (route.worker, route.overlap_blocks) == (first, 10)
    router.state.leave(first)
    assert router.route(ask(longer, "c")).overlap_blocks == 0
    clock.now_s += PENDING_PROMPT_S
    router.tick()
    assert not router.state.pending.prompts
    assert router.route(ask(longer, "d")).overlap_blocks == 0


def test_a_prompt_computed_in_chunks_stays_pending_until_its_last_block() -> None:
    one, two = Worker(1), Worker(2)
    router, _ = served(one, two)
    hashes = block_hashes(PROMPT, SIZE)
    assert router.route(ask(PROMPT, "a", exclude=[2])).worker == 1
    for chunk in ({hashes[0], hashes[1]}, {hashes[2]}):
        router.state.apply_events(one.change(0, chunk, stored=True))
        assert router.route(ask(PROMPT, "b", exclude=[2])).overlap_blocks == 10
    router.state.apply_events(one.change(0, set(hashes), stored=True))
    assert not router.state.pending.prompts
    router.state.apply_events(one.change(0, set(hashes[4:]), stored=False))
    assert router.route(ask(PROMPT, "c", exclude=[2])).overlap_blocks == 4


def test_a_worker_that_reuses_a_slot_inherits_nothing() -> None:
    one, two = Worker(1), Worker(2)
    router, _ = served(one)
    router.route(ask(PROMPT, "a"))  # is expected
    router.state.apply_load(one.load(decode_blocks=50, kv_events=False))  # blind: what was sent counts
    router.route(ask(PROMPT, "b"))
    router.state.leave(1)
    with pytest.raises(NoInstancesError):
        router.route(ask(PROMPT, "c"))
    router.state.join(2)
    (cache,) = router.state.caches
    assert (cache.worker, cache.slot, cache.prefill_blocks, cache.decode_blocks) == (2, 0, 0, 0)
    assert not router.state.without_events
    router.state.apply_snapshot(2, two.snapshot())
    assert router.route(ask(PROMPT, "d", mode="kv-load")).overlap_blocks == 0
    router.state.apply_load(two.load(kv_events=False))
    assert router.route(ask(PROMPT, "e")).overlap_blocks == 0


@pytest.mark.parametrize("left", [False, True])
def test_an_excluded_idle_worker_does_not_hide_the_best_of_the_others(left: bool) -> None:
    idle, holder, other = Worker(1), Worker(2), Worker(3)
    holder.held[0] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(idle, holder, other)
    for worker in (holder, other):
        router.state.apply_load(worker.load(decode_blocks=40))
    if left:
        router.state.leave(1)
    route = router.route(ask(PROMPT, exclude=[] if left else [1]))
    assert (route.worker, route.overlap_blocks) == (2, 10)


@given(
    held=st.lists(st.integers(0, 10), min_size=1, max_size=4),
    loads=st.lists(st.integers(0, 15), min_size=4, max_size=4),
    scale=st.sampled_from([1.0, 0.5, 8.0]),
    credit=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
    asked=st.none() | st.sampled_from([0.0, 0.5, 3.0]),
    out=st.sets(st.integers(1, 4), max_size=2),
)
@settings(max_examples=300)
def test_the_choice_has_the_lowest_cost(
    held: list[int], loads: list[int], scale: float, credit: float, asked: float | None, out: set[int]
) -> None:
    workers = [Worker(i) for i in range(1, len(held) + 1)]
    hashes = block_hashes(PROMPT, SIZE)
    for worker, blocks in zip(workers, held, strict=True):
        worker.held[0] |= set(hashes[:blocks])
    router, _ = served(*workers, weights=Weights(scale, credit))
    for worker, load in zip(workers, loads, strict=False):
        router.state.apply_load(worker.load(decode_blocks=load))
    excluded = [worker.id for worker in workers if worker.id in out]
    if len(excluded) == len(workers):
        excluded.pop()
    caches = [cache for cache in router.state.caches if cache.worker not in excluded]
    weights = Weights(scale, credit if asked is None else asked)
    found = costs(len(hashes), router.state.index.overlaps(hashes), caches, weights)
    true = {cache.worker: cost for cache, cost in zip(caches, found, strict=True)}
    route = router.route(ask(PROMPT, exclude=excluded, overlap_credit=asked))
    assert true[route.worker] == min(true.values())
    assert route.overlap_blocks == held[route.worker - 1]


def test_a_temperature_spreads_over_unequal_workers() -> None:
    for of_router, of_request in ((5.0, None), (0.0, 5.0)):
        one, two = Worker(1), Worker(2)
        router, _ = served(one, two, weights=Weights(1.0, 1.0, of_router))
        router.state.apply_load(one.load(decode_blocks=500))
        assert {router.route(ask([i] * 4, str(i), temperature=of_request)).worker for i in range(200)} == {1, 2}


def test_a_worker_without_events_is_routed_by_history(caplog: pytest.LogCaptureFixture) -> None:
    one, two = Worker(1), Worker(2)
    router, _ = served(one, two)
    with caplog.at_level(logging.WARNING):
        for worker in (one, two):
            router.state.apply_load(worker.load(kv_events=False))
            router.state.apply_load(worker.load(kv_events=False))
    assert len(caplog.records) == 1
    assert "approx-kv" in caplog.text
    first = router.route(ask(PROMPT, "a"))
    assert first.overlap_blocks == 0
    router.state.apply_load((one, two)[first.worker - 1].load(kv_events=False, accepted=["a"]))
    again = router.route(ask(PROMPT, "b"))
    assert (again.worker, again.overlap_blocks) == (first.worker, 10)


def test_missing_events_are_noticed_and_used_again_when_they_arrive(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(1)
    router, clock = served(worker)
    for i in range(SILENT_REQUESTS):
        router.route(ask([i] * 40, str(i)))
    router.tick()
    assert not router.state.without_events
    clock.now_s += SILENT_S + 1
    router.tick()
    assert router.state.without_events
    assert "no KV event in 10 s of requests" in caplog.text
    router.state.apply_events(worker.change(0, set(block_hashes(PROMPT, SIZE)), stored=True))
    assert not router.state.without_events
    assert router.route(ask(PROMPT)).overlap_blocks == 10


def test_approximate_mode_ignores_events() -> None:
    one, two = Worker(1), Worker(2)
    one.held[0] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(one, two, mode="approx-kv")
    assert router.route(ask(PROMPT, "a")).overlap_blocks == 0  # what the events say is not used
    route = router.route(ask(PROMPT, "b"))
    assert route.overlap_blocks in (0, 10)
    assert router.route(ask(PROMPT, "c", mode="kv", exclude=[2])).overlap_blocks == 10


def test_kv_load_takes_the_emptiest_cache_relative_to_its_size() -> None:
    one, two = Worker(1), Worker(2)
    router, _ = served(one, two)
    router.state.apply_load(one.load(decode_blocks=300, kv_blocks=1000))
    router.state.apply_load(two.load(decode_blocks=200, kv_blocks=400))
    assert router.route(ask(PROMPT, "a", mode="kv-load")).worker == 1


def test_ranks_of_one_worker_have_separate_caches() -> None:
    worker = Worker(1, ranks=2)
    worker.held[1] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(worker)
    route = router.route(ask(PROMPT))
    assert (route.worker, route.rank, route.ranks, route.overlap_blocks) == (1, 1, 2, 10)


def test_a_custom_score_replaces_the_cost() -> None:
    seen: list[Candidate] = []

    def score(request: RouteRequest, candidate: Candidate) -> float:
        seen.append(candidate)
        return -candidate.worker

    one, two = Worker(1), Worker(2)
    one.held[0] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(one, two, score=score)
    assert router.route(ask(PROMPT)).worker == 2
    assert [(c.worker, c.overlap_blocks, c.kv_blocks) for c in seen] == [(1, 10, 1000), (2, 0, 1000)]


def test_another_block_size_is_returned_and_load_decides() -> None:
    one, two = Worker(1), Worker(2)
    one.held[0] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(one, two)
    router.state.apply_load(one.load(decode_blocks=1))
    route = router.route(ask(PROMPT, "a", size=8))
    assert (route.worker, route.overlap_blocks, route.block_size) == (2, 0, SIZE)


def test_equal_workers_share_and_temperature_spreads() -> None:
    workers = [Worker(i) for i in range(1, 5)]
    router, _ = served(*workers, weights=Weights(temperature=0.5))
    chosen = Counter(router.route(ask([i] * 4, str(i))).worker for i in range(400))
    assert set(chosen) == {1, 2, 3, 4}


def test_common_prefix() -> None:
    one, two = block_hashes(PROMPT, SIZE), block_hashes([*PROMPT[:21], 99, *PROMPT[22:]], SIZE)
    assert common_blocks(one, two) == 5
    assert common_blocks(one, one) == len(one)
    assert common_blocks(one, []) == 0

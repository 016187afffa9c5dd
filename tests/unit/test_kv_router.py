"""KvRouter and Caches: the index follows the workers whatever is lost, and requests go where they should."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dynamo.errors import NoInstancesError
from dynamo.kv.caches import PENDING_S, SILENT_REQUESTS, SILENT_S
from dynamo.kv.cost import Weights
from dynamo.kv.events import Change, KvEvents, KvSnapshot, WorkerLoad
from dynamo.kv.hashing import BlockHash, block_hashes, pack
from dynamo.kv.route import Candidate, RouteRequest
from dynamo.kv.router import EXPECTED_S, KvRouter, common

SIZE = 4


class Worker:
    """What a worker does towards the router, with one cache for each rank."""

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
    """Workers change, messages get lost, routers and workers come and go; in the end the router knows what is there."""

    @initialize()
    def begin(self) -> None:
        self.next_id = 1
        self.workers: dict[int, Worker] = {}
        self.late: list[KvEvents] = []  # sent, and not yet delivered
        self.wanted: set[int] = set()
        self.router = KvRouter()
        self.come()

    @rule()
    def come(self) -> None:
        worker = Worker(self.next_id, ranks=1 + self.next_id % 2)
        self.next_id += 1
        self.workers[worker.id] = worker
        self.router.caches.join(worker.id)
        self.wanted.add(worker.id)

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        if len(self.workers) > 1:
            gone = data.draw(st.sampled_from(sorted(self.workers)))
            del self.workers[gone]
            self.router.leave(gone)

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
        if self.router.caches.take_events(message):
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
                if self.router.caches.take_load(worker.load(rank)):
                    self.wanted.add(worker.id)

    @rule()
    def snapshots_arrive(self) -> None:
        wanted, self.wanted = self.wanted, set()
        for id in wanted & self.workers.keys():
            if self.router.caches.take_snapshot(id, self.workers[id].snapshot()):
                self.wanted.add(id)

    @rule()
    def router_restarts(self) -> None:
        self.router = KvRouter()
        self.wanted = set(self.workers)
        for id in self.workers:
            self.router.caches.join(id)

    @invariant()
    def knows_no_stranger(self) -> None:
        assert set(self.router.caches.workers) == set(self.workers)
        for held in self.router.caches.index.holders.values():
            assert held & ~self.router.caches.alive == 0

    def teardown(self) -> None:
        if not hasattr(self, "router"):
            return
        self.late_messages_arrive()
        for _ in range(3):  # what was lost at the end shows at the second load
            self.snapshots_arrive()
            self.loads_arrive()
        self.snapshots_arrive()
        for cache in self.router.caches.all():
            assert self.router.caches.index.blocks(cache.slot) == self.workers[cache.worker].held[cache.rank]


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
        router.caches.join(worker.id)
        router.caches.take_snapshot(worker.id, worker.snapshot())
        for rank in range(len(worker.held)):
            router.caches.take_load(worker.load(rank))
    return router, clock


def ask(tokens: list[int], id: str = "r", size: int = SIZE, **options: object) -> RouteRequest:
    return RouteRequest(id, len(tokens), size, pack(block_hashes(tokens, size)), **options)  # type: ignore[arg-type]


PROMPT = list(range(40))


def test_goes_where_the_prefix_is_unless_the_load_is_worth_more() -> None:
    one, two = Worker(1), Worker(2)
    one.held[0] |= set(block_hashes(PROMPT[:24], SIZE))
    router, _ = served(one, two)
    route = router.route(ask(PROMPT, "a"))
    assert (route.worker, route.overlap_blocks, route.block_size) == (1, 6, SIZE)
    router.caches.take_load(one.load(accepted=["a"], prefill_blocks=4, decode_blocks=10))
    assert router.route(ask(PROMPT, "b")).worker == 2  # 4 + 10 of load against 6 of overlap
    assert router.route(ask(PROMPT, "c", mode="kv", overlap_credit=0.0)).worker == 1  # b counts there, unreported
    assert router.route(ask(PROMPT, "d", exclude=[2])).worker == 1
    with pytest.raises(NoInstancesError):
        router.route(ask(PROMPT, "e", exclude=[1, 2]))


def test_a_placed_request_counts_until_it_is_reported_or_given_up() -> None:
    worker = Worker(1)
    router, clock = served(worker)
    loads = router.caches.loads
    router.route(ask(PROMPT, "a"))
    assert (loads.prefill[0], loads.decode[0]) == (10, 10)
    router.caches.take_load(worker.load())  # sent before it came
    assert (loads.prefill[0], loads.decode[0]) == (10, 10)
    router.caches.take_load(worker.load(accepted=["a"], prefill_blocks=9, decode_blocks=10))
    assert (loads.prefill[0], loads.decode[0]) == (9, 10)
    router.route(ask(PROMPT, "b"))  # its caller dies
    clock.now_s += PENDING_S
    router.tick()
    assert (loads.prefill[0], loads.decode[0]) == (9, 10)


def test_a_prompt_on_its_way_counts_as_cached() -> None:
    one, two = Worker(1), Worker(2)
    router, clock = served(one, two)
    first = router.route(ask(PROMPT, "a")).worker
    longer = [*PROMPT, 7, 7, 7, 7]
    route = router.route(ask(longer, "b", exclude=[3 - first]))
    assert (route.worker, route.overlap_blocks) == (first, 10)
    router.leave(first)
    assert router.route(ask(longer, "c")).overlap_blocks == 0
    clock.now_s += EXPECTED_S
    router.tick()
    assert router.route(ask(longer, "d")).overlap_blocks == 0


def test_a_worker_without_events_is_known_by_what_was_sent_there(caplog: pytest.LogCaptureFixture) -> None:
    one, two = Worker(1), Worker(2)
    router, _ = served(one, two)
    with caplog.at_level(logging.WARNING):
        for worker in (one, two):
            router.caches.take_load(worker.load(kv_events=False))
            router.caches.take_load(worker.load(kv_events=False))
    assert len(caplog.records) == 1
    assert "approx-kv" in caplog.text
    first = router.route(ask(PROMPT, "a"))
    assert first.overlap_blocks == 0
    router.caches.take_load((one, two)[first.worker - 1].load(kv_events=False, accepted=["a"]))
    again = router.route(ask(PROMPT, "b"))
    assert (again.worker, again.overlap_blocks) == (first.worker, 10)


def test_events_that_never_come_are_noticed_and_count_again_when_they_do(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(1)
    router, clock = served(worker)
    for i in range(SILENT_REQUESTS):
        router.route(ask([i] * 40, str(i)))
    router.tick()
    assert not router.caches.blind
    clock.now_s += SILENT_S + 1
    router.tick()
    assert router.caches.blind
    assert "no KV event came in 10 s of requests" in caplog.text
    router.caches.take_events(worker.change(0, set(block_hashes(PROMPT, SIZE)), stored=True))
    assert not router.caches.blind
    assert router.route(ask(PROMPT)).overlap_blocks == 10


def test_approximate_mode_needs_no_events_at_all() -> None:
    one, two = Worker(1), Worker(2)
    one.held[0] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(one, two, mode="approx-kv")
    assert router.route(ask(PROMPT, "a")).overlap_blocks == 0  # what the events say is not used
    route = router.route(ask(PROMPT, "b"))
    assert route.overlap_blocks in (0, 10)
    assert router.route(ask(PROMPT, "c", mode="kv", exclude=[2])).overlap_blocks == 10


def test_the_emptiest_cache_relative_to_its_size() -> None:
    one, two = Worker(1), Worker(2)
    router, _ = served(one, two)
    router.caches.take_load(one.load(decode_blocks=300, kv_blocks=1000))
    router.caches.take_load(two.load(decode_blocks=200, kv_blocks=400))
    assert router.route(ask(PROMPT, "a", mode="kv-load")).worker == 1


def test_ranks_of_one_worker_are_caches_of_their_own() -> None:
    worker = Worker(1, ranks=2)
    worker.held[1] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(worker)
    route = router.route(ask(PROMPT))
    assert (route.worker, route.rank, route.ranks, route.overlap_blocks) == (1, 1, 2, 10)


def test_an_author_may_score() -> None:
    seen: list[Candidate] = []

    def score(request: RouteRequest, candidate: Candidate) -> float:
        seen.append(candidate)
        return -candidate.worker

    one, two = Worker(1), Worker(2)
    one.held[0] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(one, two, score=score)
    assert router.route(ask(PROMPT)).worker == 2
    assert [(c.worker, c.overlap_blocks, c.kv_blocks) for c in seen] == [(1, 10, 1000), (2, 0, 1000)]


def test_another_block_size_is_told_and_the_load_decides() -> None:
    one, two = Worker(1), Worker(2)
    one.held[0] |= set(block_hashes(PROMPT, SIZE))
    router, _ = served(one, two)
    router.caches.take_load(one.load(decode_blocks=1))
    route = router.route(ask(PROMPT, "a", size=8))
    assert (route.worker, route.overlap_blocks, route.block_size) == (2, 0, SIZE)


def test_equal_workers_share_and_temperature_spreads() -> None:
    workers = [Worker(i) for i in range(1, 5)]
    router, _ = served(*workers, weights=Weights(temperature=0.5))
    chosen = Counter(router.route(ask([i] * 4, str(i))).worker for i in range(400))
    assert set(chosen) == {1, 2, 3, 4}


def test_common_prefix() -> None:
    one, two = block_hashes(PROMPT, SIZE), block_hashes([*PROMPT[:21], 99, *PROMPT[22:]], SIZE)
    assert common(one, two) == 5
    assert common(one, one) == len(one)
    assert common(one, []) == 0

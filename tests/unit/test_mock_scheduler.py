"""Properties of the mock engine's block pool and scheduler. Parity with vLLM: tests/vllm/test_mock_parity.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.engines.mock.block_pool import Block, BlockPool
from dynamo.engines.mock.scheduler import ScheduledSequence, ScheduledStep, Scheduler
from dynamo.engines.mock.timing import decode_ms, prefill_ms, step_ms
from dynamo.kv_router.events import BlocksRemoved, BlocksStored
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes

SIZE = 4


class Checked(BlockPool):
    """A block pool that compares each look-up with the set of blocks that its events describe."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks, SIZE, events=True)
        self.reported: Counter[int] = Counter()

    def listen(self) -> None:
        for event in self.drain_events():
            if isinstance(event, BlocksRemoved):
                self.reported.subtract(event.hashes)
            else:
                assert isinstance(event, BlocksStored)
                assert event.parent is None or self.reported[event.parent] > 0
                assert list(event.hashes) == block_hashes(event.token_ids, SIZE, BlockHash(event.parent or ROOT))
                self.reported.update(event.hashes)
            assert min(self.reported.values()) >= 0

    def find(self, hashes: Sequence[BlockHash], limit: int) -> list[Block]:
        self.listen()
        found = super().find(hashes, limit)
        there = [self.reported[hash] > 0 for hash in hashes[:limit]]
        assert len(found) == (*there, False).index(False)
        return found


class Text(ScheduledSequence):
    """A sequence that generates `limit` tokens, each a function of all tokens before it."""

    __slots__ = ("limit",)

    def __init__(self, prompt: list[int], limit: int) -> None:
        super().__init__(prompt, block_hashes(prompt, SIZE))
        self.limit = limit

    def advance(self) -> bool:
        self.output.append((sum(self.prompt) + sum(self.output)) % 3)
        return len(self.output) == self.limit


def make(blocks: int, *, batched_tokens: int = 16, sequences: int = 4) -> tuple[Checked, Scheduler[Text]]:
    cache = Checked(blocks)
    return cache, Scheduler(cache, batched_tokens=batched_tokens, sequences=sequences)


def check(cache: Checked, scheduler: Scheduler[Text]) -> None:
    """Assert the invariants, which hold between steps and within one."""
    cache.listen()
    there = [*cache.cached.values(), *(block for copies in cache.duplicates.values() for block in copies)]
    assert len(set(there)) == len(there)
    assert all(block.hash == name for name, block in cache.cached.items())
    assert all(copies and name in cache.cached for name, copies in cache.duplicates.items())
    assert +cache.reported == Counter(block.hash for block in there)

    holders = Counter(block for sequence in scheduler.running for block in sequence.blocks)
    assert all(block.holders == holders[block] for block in there)
    assert set(cache.evictable) == {block for block in there if not holders[block]}
    assert holders.keys() <= set(there)
    uncached = sum(sequence.uncached for sequence in scheduler.running)
    assert len(holders) + uncached + cache.free == cache.usable
    assert cache.free_uncached >= 0
    assert scheduler.kv_tokens == sum(sequence.computed for sequence in scheduler.running)

    for sequence in scheduler.running:
        tokens = sequence.prompt + sequence.output
        full = sequence.computed // SIZE
        assert [block.hash for block in sequence.blocks] == block_hashes(tokens, SIZE)[:full]
        assert len(sequence.blocks) + sequence.uncached == -(-sequence.computed // SIZE)
    for waiting in scheduler.waiting:
        assert (waiting.blocks, waiting.uncached, waiting.computed, waiting.running) == ([], 0, 0, False)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)  # so few tokens that prefixes are shared
ACTIONS = st.one_of(
    st.tuples(st.just("add"), PROMPTS, st.integers(1, 12)),
    st.tuples(st.just("remove"), st.integers(0, 100), st.none()),
    st.tuples(st.just("step"), st.booleans(), st.none()),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTIONS, max_size=60), st.integers(9, 20), st.integers(1, 30), st.integers(1, 5))
def test_no_block_is_lost_or_counted_twice(actions: list[tuple], blocks: int, batched: int, sequences: int) -> None:
    cache, scheduler = make(blocks, batched_tokens=batched, sequences=sequences)
    texts: list[Text] = []
    removed: set[Text] = set()

    def step(remove_one: bool) -> bool:
        found = scheduler.schedule()
        check(cache, scheduler)
        if found is None:
            assert not len(scheduler), "nothing runs though something waits"
            return False
        assert 0 < found.prefill_tokens + found.decodes <= batched
        assert len(scheduler.running) <= sequences
        if remove_one:  # while the step is computed
            removed.add(scheduler.batch[-1])
            scheduler.remove(scheduler.batch[-1])
            check(cache, scheduler)
        scheduler.complete(Text.advance)
        check(cache, scheduler)
        return True

    for kind, what, limit in actions:
        if kind == "add":
            texts.append(Text(what, limit))
            scheduler.add(texts[-1])
        elif kind == "remove" and texts:
            removed.add(texts[what % len(texts)])
            scheduler.remove(texts[what % len(texts)])
            check(cache, scheduler)
        elif kind == "step":
            step(what)
    for _ in range(5000):
        if not step(False):
            break
    assert not len(scheduler)
    assert cache.free == cache.usable
    for text in texts:
        alone = Text(text.prompt, text.limit)
        while not alone.advance():
            pass
        assert text.output == alone.output[: len(text.output)]
        assert text in removed or len(text.output) == text.limit


def drain(scheduler: Scheduler[Text]) -> list[ScheduledStep]:
    steps = []
    while (step := scheduler.schedule()) is not None:
        steps.append(step)
        scheduler.complete(Text.advance)
    return steps


@settings(deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.integers(1, 12)), max_size=12))
def test_hits_are_the_longest_computed_prefix(turns: list[tuple[list[int], int]]) -> None:
    _, scheduler = make(1000)
    computed: list[list[int]] = []
    hits = queries = 0
    for prompt, limit in turns:
        longest = 0
        for before in computed:
            while before[: longest + SIZE] == prompt[: longest + SIZE] and longest + SIZE < len(prompt):
                longest += SIZE
                if longest + SIZE > len(before):
                    break
        text = Text(prompt, limit)
        scheduler.add(text)
        drain(scheduler)
        assert text.cached_tokens == longest
        computed.append((prompt + text.output)[:-1])  # the KV of the last token is never computed
        hits, queries = hits + longest, queries + len(prompt)
    assert (scheduler.prefix_hits, scheduler.prefix_queries) == (hits, queries)


def test_chunks_share_a_step_with_decodes() -> None:
    _, scheduler = make(100, batched_tokens=8)
    scheduler.add(Text([1] * 6, 5))
    scheduler.add(Text([2] * 20, 2))
    assert drain(scheduler) == [
        ScheduledStep(8, 0),
        ScheduledStep(7, 1),
        ScheduledStep(7, 1),
        ScheduledStep(4, 1),
        ScheduledStep(0, 2),
    ]


def test_the_last_admitted_sequence_is_preempted_and_readmitted_first() -> None:
    cache, scheduler = make(8, batched_tokens=32)  # 7 blocks
    first, second, third = (Text([number] * 8, 14) for number in (1, 2, 3))
    for text in (first, second, third):
        scheduler.add(text)
    while not any(t.preemptions for t in (first, second, third)):
        assert scheduler.schedule() is not None
        scheduler.complete(Text.advance)
    assert scheduler.running == [first, second]
    assert list(scheduler.waiting) == [third]
    drain(scheduler)
    assert [len(t.output) for t in (first, second, third)] == [14, 14, 14]
    assert cache.free == cache.usable
    assert scheduler.prefix_queries == 24  # a second look-up does not count


def test_a_prompt_that_does_not_fit_is_looked_up_again_only_after_a_change() -> None:
    cache, scheduler = make(8, batched_tokens=32)  # 7 blocks
    running, refused = Text([1] * 20, 8), Text([2] * 20, 1)
    searched: list[int] = []
    find = cache.find
    cache.find = lambda hashes, limit: searched.append(limit) or find(hashes, limit)  # type: ignore[method-assign]
    scheduler.add(running)
    scheduler.add(refused)
    while running.computed != 23:
        scheduler.schedule()
        scheduler.complete(Text.advance)
    assert len(searched) == 2
    drain(scheduler)
    assert len(refused.output) == 1


def test_eviction_order_is_oldest_first_and_from_the_end_of_a_prompt() -> None:
    cache, scheduler = make(6)  # 5 blocks
    for number in (1, 2):
        scheduler.add(Text([number] * 8, 1))
        drain(scheduler)
    cache.listen()
    scheduler.add(Text([3] * 12, 1))  # one block is unused; two must be evicted
    drain(scheduler)
    removed = [name for event in cache.drain_events() if isinstance(event, BlocksRemoved) for name in event.hashes]
    assert removed == block_hashes([1] * 8, SIZE)[::-1]


def test_step_times_match_the_published_model() -> None:
    assert prefill_ms(1000) == pytest.approx(16.50142 + 15.18344 + 0.4209989)
    assert decode_ms(0.0) == 5.74
    assert decode_ms(0.5) == pytest.approx(5.74 + 27.005 - 6.435)
    assert step_ms(ScheduledStep(100, 3), 0.5) == prefill_ms(100) + decode_ms(0.5)
    assert step_ms(ScheduledStep(0, 3), 0.5) == decode_ms(0.5)
    assert step_ms(ScheduledStep(100, 0), 0.5) == prefill_ms(100)

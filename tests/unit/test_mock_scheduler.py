"""Laws of the mock's KV cache and scheduler. That both do as vLLM does: tests/vllm/test_mock_parity.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.engines.mock.kv_cache import Block, KvCache
from dynamo.engines.mock.scheduler import Scheduler, Sequence, Step
from dynamo.engines.mock.timing import decode_ms, prefill_ms, step_ms
from dynamo.kv_router.events import BlocksRemoved, BlocksStored
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes

SIZE = 4


class Checked(KvCache):
    """Compares each look-up with what a listener to the events would say."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks, SIZE, events=True)
        self.told: Counter[int] = Counter()

    def listen(self) -> None:
        for event in self.take_events():
            if isinstance(event, BlocksRemoved):
                self.told.subtract(event.hashes)
            else:
                assert isinstance(event, BlocksStored)
                assert event.parent is None or self.told[event.parent] > 0
                assert list(event.hashes) == block_hashes(event.token_ids, SIZE, BlockHash(event.parent or ROOT))
                self.told.update(event.hashes)
            assert min(self.told.values()) >= 0

    def find(self, names: Items[BlockHash], limit: int) -> list[Block]:
        self.listen()
        found = super().find(names, limit)
        there = [self.told[name] > 0 for name in names[:limit]]
        assert len(found) == (*there, False).index(False)
        return found


class Text(Sequence):
    """Generates a token that depends on all before it, `limit` of them."""

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
    """What holds at any time, between steps and within one."""
    cache.listen()
    there = [*cache.named.values(), *(block for twins in cache.twins.values() for block in twins)]
    assert len(set(there)) == len(there)
    assert all(block.name == name for name, block in cache.named.items())
    assert all(twins and name in cache.named for name, twins in cache.twins.items())
    assert +cache.told == Counter(block.name for block in there)

    holders = Counter(block for sequence in scheduler.running for block in sequence.blocks)
    assert all(block.holders == holders[block] for block in there)
    assert set(cache.evictable) == {block for block in there if not holders[block]}
    assert holders.keys() <= set(there)
    unnamed = sum(sequence.unnamed for sequence in scheduler.running)
    assert len(holders) + unnamed + cache.free == cache.usable
    assert cache.unnamed >= 0
    assert scheduler.kv_tokens == sum(sequence.computed for sequence in scheduler.running)

    for sequence in scheduler.running:
        tokens = sequence.prompt + sequence.output
        full = sequence.computed // SIZE
        assert [block.name for block in sequence.blocks] == block_hashes(tokens, SIZE)[:full]
        assert len(sequence.blocks) + sequence.unnamed == -(-sequence.computed // SIZE)
    for waiting in scheduler.waiting:
        assert (waiting.blocks, waiting.unnamed, waiting.computed, waiting.running) == ([], 0, 0, False)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)  # so few tokens that prefixes are shared
ACTIONS = st.one_of(
    st.tuples(st.just("add"), PROMPTS, st.integers(1, 12)),
    st.tuples(st.just("remove"), st.integers(0, 100), st.none()),
    st.tuples(st.just("step"), st.booleans(), st.none()),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTIONS, max_size=60), st.integers(9, 20), st.integers(1, 30), st.integers(1, 5))
def test_nothing_is_lost_or_counted_twice(actions: list[tuple], blocks: int, batched: int, sequences: int) -> None:
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


def drain(scheduler: Scheduler[Text]) -> list[Step]:
    steps = []
    while (step := scheduler.schedule()) is not None:
        steps.append(step)
        scheduler.complete(Text.advance)
    return steps


@settings(deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.integers(1, 12)), max_size=12))
def test_hits_are_the_longest_prefix_that_was_computed(turns: list[tuple[list[int], int]]) -> None:
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
        computed.append((prompt + text.output)[:-1])  # nobody needed the KV of the last token
        hits, queries = hits + longest, queries + len(prompt)
    assert (scheduler.prefix_hits, scheduler.prefix_queries) == (hits, queries)


def test_chunks_share_a_step_with_decodes() -> None:
    _, scheduler = make(100, batched_tokens=8)
    scheduler.add(Text([1] * 6, 5))
    scheduler.add(Text([2] * 20, 2))
    assert drain(scheduler) == [Step(8, 0), Step(7, 1), Step(7, 1), Step(4, 1), Step(0, 2)]


def test_the_last_admitted_is_preempted_and_goes_first_again() -> None:
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
    assert scheduler.prefix_queries == 24  # what is looked up again does not count


def test_a_prompt_that_does_not_fit_is_looked_up_again_only_when_something_has_changed() -> None:
    cache, scheduler = make(8, batched_tokens=32)  # 7 blocks
    running, refused = Text([1] * 20, 8), Text([2] * 20, 1)
    searched: list[int] = []
    find = cache.find
    cache.find = lambda names, limit: searched.append(limit) or find(names, limit)  # type: ignore[method-assign]
    scheduler.add(running)
    scheduler.add(refused)
    while running.computed != 23:
        scheduler.schedule()
        scheduler.complete(Text.advance)
    assert len(searched) == 2
    drain(scheduler)
    assert len(refused.output) == 1


def test_the_oldest_free_blocks_go_first_and_the_end_of_a_prompt_before_its_beginning() -> None:
    cache, scheduler = make(6)  # 5 blocks
    for number in (1, 2):
        scheduler.add(Text([number] * 8, 1))
        drain(scheduler)
    cache.listen()
    scheduler.add(Text([3] * 12, 1))  # one block is unused; two have to go
    drain(scheduler)
    removed = [name for event in cache.take_events() if isinstance(event, BlocksRemoved) for name in event.hashes]
    assert removed == block_hashes([1] * 8, SIZE)[::-1]


def test_times_are_the_published_ones() -> None:
    assert prefill_ms(1000) == pytest.approx(16.50142 + 15.18344 + 0.4209989)
    assert decode_ms(0.0) == 5.74
    assert decode_ms(0.5) == pytest.approx(5.74 + 27.005 - 6.435)
    assert step_ms(Step(100, 3), 0.5) == prefill_ms(100) + decode_ms(0.5)
    assert step_ms(Step(0, 3), 0.5) == decode_ms(0.5)
    assert step_ms(Step(100, 0), 0.5) == prefill_ms(100)

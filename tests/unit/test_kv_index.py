"""The prefix index and the cost function, against the plainest model of each."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from dynamo.kv_router.approximate_index import ApproximateIndex
from dynamo.kv_router.cost import Weights, costs, draw
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes, pack, unpack
from dynamo.kv_router.index import PrefixIndex, slots_of
from dynamo.kv_router.pending_prefixes import PendingPrefixes, common_blocks
from dynamo.kv_router.worker_state import CacheState, WorkerState

SLOTS = 5


def chain(*names: int) -> list[BlockHash]:
    return block_hashes(list(names), 1)


@given(st.lists(st.integers(0, 2**31), max_size=40), st.integers(1, 7), st.integers(0, 40))
def test_hashes_of_a_prefix_are_a_prefix_of_the_hashes(tokens: list[int], size: int, cut: int) -> None:
    hashes = block_hashes(tokens, size)
    assert len(hashes) == len(tokens) // size
    assert block_hashes(tokens[:cut], size) == hashes[: len(tokens[:cut]) // size]
    blocks = len(tokens[:cut]) // size
    rest = block_hashes(tokens[blocks * size :], size, hashes[blocks - 1] if blocks else ROOT)
    assert hashes[:blocks] + rest == hashes
    assert unpack(pack(hashes)) == hashes


def test_a_hash_depends_on_all_tokens_before_its_block() -> None:
    assert block_hashes([1, 2, 3, 4], 2)[1] != block_hashes([9, 2, 3, 4], 2)[1]
    assert block_hashes([1, 2], 2) != block_hashes([2, 1], 2)
    assert block_hashes([1, 2], 2, BlockHash(7)) != block_hashes([1, 2], 2)


# prompts from few names, so that they share prefixes; what a cache holds is made of whole prefixes
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=12)
holdings = st.lists(st.tuples(st.integers(0, SLOTS - 1), prompts), max_size=12)


def prefix_length(held: set[BlockHash], prompt: list[BlockHash]) -> int:
    return next((i for i, hash in enumerate(prompt) if hash not in held), len(prompt))


@given(st.sets(st.integers(0, 200)))
def test_slots_of_a_set_of_holders(slots: set[int]) -> None:
    assert slots_of(sum(1 << slot for slot in slots)) == sorted(slots)


@given(holdings, st.lists(prompts, min_size=1, max_size=8))
def test_overlaps_are_the_longest_prefixes(held: list[tuple[int, list[int]]], questions: list[list[int]]) -> None:
    index = PrefixIndex()
    sets: dict[int, set[BlockHash]] = {slot: set() for slot in range(SLOTS)}
    for slot, names in held:
        index.add(slot, chain(*names))
        sets[slot] |= set(chain(*names))
    for names in questions:
        prompt = chain(*names)
        expected = {slot: prefix_length(sets[slot], prompt) for slot in range(SLOTS)}
        assert index.overlaps(prompt) == {slot: blocks for slot, blocks in expected.items() if blocks}
        assert {slot: index.overlap(slot, prompt) for slot in range(SLOTS)} == expected
    assert all(index.blocks(slot) == sets[slot] for slot in range(SLOTS))
    assert len(index) == len(set().union(*sets.values()))


@given(holdings, holdings, prompts, st.sets(st.integers(0, SLOTS - 1)), st.booleans())
def test_caches_without_events_are_looked_up_in_the_approximate_index(
    reported: list[tuple[int, list[int]]],
    sent: list[tuple[int, list[int]]],
    names: list[int],
    without_events: set[int],
    approximate: bool,
) -> None:
    state = WorkerState()
    for index, held in ((state.index, reported), (state.approximate.index, sent)):
        for slot, blocks in held:
            index.add(slot, chain(*blocks))
    state.without_events = without_events
    prompt = chain(*names)
    found = state.overlaps(prompt, approximate=approximate, now_s=0)
    one, two = state.index.overlaps(prompt), state.approximate.index.overlaps(prompt)
    for slot in range(SLOTS):
        expected = two if approximate or slot in without_events else one
        assert found.get(slot, 0) == expected.get(slot, 0)


@given(holdings, st.lists(st.tuples(st.integers(0, SLOTS - 1), prompts, st.booleans()), max_size=8), prompts)
def test_pending_prompts_raise_overlaps_to_what_they_have_in_common(
    held: list[tuple[int, list[int]]], placed: list[tuple[int, list[int], bool]], names: list[int]
) -> None:
    index, now_s = PrefixIndex(), 5.0
    pending = PendingPrefixes(index)
    for slot, blocks in held:
        index.add(slot, chain(*blocks))
    common: dict[int, list[int]] = {slot: [0] for slot in range(SLOTS)}
    prompt = chain(*names)
    for slot, blocks, expired in placed:
        own = chain(*blocks)
        depth = index.overlap(slot, own)
        if depth < len(own):
            pending.add(slot, own, depth, now_s - 1 if expired else now_s + 1)
            if not expired:
                common[slot].append(common_blocks(prompt, own))
    before = index.overlaps(prompt)
    found = dict(before)
    pending.raise_overlaps(found, prompt, now_s)
    for slot in range(SLOTS):
        overlap = before.get(slot, 0)
        assert found.get(slot, 0) in {overlap, *(blocks for blocks in common[slot] if blocks > overlap)}
        if overlap < len(prompt):  # a prompt that the cache goes on with right there counts
            entry = pending.prompts.get(prompt[overlap], {}).get(slot)
            if entry is not None and entry.until_s > now_s:
                assert found[slot] >= common_blocks(prompt, entry.blocks) > overlap


@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.sets(st.integers(0, 11))), max_size=8), st.integers(1, 12))
def test_a_missing_block_in_the_middle_gives_a_prefix_whose_last_block_is_held(
    held: list[tuple[int, set[int]]], length: int
) -> None:
    index, names = PrefixIndex(), chain(*[0] * 12)
    for slot, kept in held:
        index.add(slot, [names[i] for i in kept])
    prompt = names[:length]
    found = index.overlaps(prompt)
    assert set(found) == {slot for slot in range(SLOTS) if prompt[0] in index.blocks(slot)}
    assert all(prompt[blocks - 1] in index.blocks(slot) for slot, blocks in found.items())


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "replace", "drop"]), st.integers(0, 2), prompts), max_size=30)
)
def test_the_index_is_the_sum_of_its_caches(steps: list[tuple[str, int, list[int]]]) -> None:
    index = PrefixIndex()
    model: dict[int, set[BlockHash]] = {slot: set() for slot in range(3)}
    for what, slot, names in steps:
        hashes = chain(*names)
        if what == "drop":
            index.drop(slot)
            model[slot] = set()
        else:
            getattr(index, what)(slot, hashes)
            model[slot] = {
                "add": model[slot] | set(hashes), "remove": model[slot] - set(hashes), "replace": set(hashes),
            }[what]  # fmt: skip
    expected: dict[BlockHash, int] = {}
    for slot, held in model.items():
        for hash in held:
            expected[hash] = expected.get(hash, 0) | 1 << slot
    assert index.holders == expected
    assert [index.blocks(slot) for slot in model] == list(model.values())


def loaded(loads: list[tuple[int, int]]) -> list[CacheState]:
    """Return caches with these prefill and decode blocks; their slots are 0, 1, …"""
    caches = []
    for slot, (prefill, decode) in enumerate(loads):
        cache = CacheState(worker=slot + 1, rank=0, slot=slot)
        cache.prefill_blocks = float(prefill)
        cache.decode_blocks = float(decode)
        caches.append(cache)
    return caches


@given(
    prompt=st.integers(1, 40),
    loads=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=6),
    depth=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    scale=st.sampled_from([1.0, 0.5, 2.0]),
    credit=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
    left_out=st.sets(st.integers(0, 5)),
)
def test_the_cheapest_cache_costs_least(
    prompt: int, loads: list[tuple[int, int]], depth: list[int], scale: float, credit: float, left_out: set[int]
) -> None:
    every = loaded(loads)
    caches = [cache for cache in every if cache.slot not in left_out] or every[:1]
    overlaps = {slot: blocks for slot, blocks in enumerate(depth[: len(loads)]) if 0 < blocks <= prompt}
    expected = []
    for cache in caches:
        prefill, decode = loads[cache.slot]
        overlap = depth[cache.slot] if depth[cache.slot] <= prompt else 0
        expected.append(scale * max(prefill + prompt - credit * overlap, 0) + decode + prompt)
    found = costs(prompt, overlaps, caches, Weights(scale, credit))
    assert found == expected
    assert expected[draw(found)] == min(expected)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 2))
def test_all_equally_cheap_caches_are_drawn(loads: list[int], held: int) -> None:
    found = costs(2, {0: held}, loaded([(0, load) for load in loads]), Weights(1.0))
    drawn = {draw(found) for _ in range(100)}
    assert drawn == {position for position, cost in enumerate(found) if cost == min(found)}


def test_equal_caches_share_and_temperature_spreads() -> None:
    caches = loaded([(0, 0)] * 4)
    random.seed(1)
    found = costs(8, {}, caches, Weights())
    assert {draw(found) for _ in range(200)} == {0, 1, 2, 3}
    caches[2].decode_blocks = 5
    found = costs(8, {}, caches, Weights())
    assert 2 not in {draw(found) for _ in range(200)}
    drawn = [draw(found, 1.0) for _ in range(2000)]
    assert 0 < drawn.count(2) < drawn.count(0)


def test_approximate_blocks_expire_and_are_evicted_when_the_cache_is_full() -> None:
    approximate, one, two = ApproximateIndex(ttl_s=10), chain(1, 2, 3), chain(1, 5)
    approximate.add(0, one, now_s=0, capacity=4)
    approximate.add(0, two, now_s=5, capacity=4)
    assert set(approximate.index.holders) == {*one, *two}
    approximate.add(0, chain(7), now_s=6, capacity=4)
    assert one[2] not in approximate.index.holders  # the end of the oldest prompt went first
    approximate.expire(now_s=12)
    assert set(approximate.index.holders) == {*two, *chain(7)}  # their first block was used at 5
    approximate.drop(0)
    assert not approximate.index.holders

"""The prefix index and the cost function, against the plainest way to say the same."""

from __future__ import annotations

import random

from hypothesis import example, given
from hypothesis import strategies as st

from dynamo.kv_router.approximate_index import ApproximateIndex
from dynamo.kv_router.cost import Loads, Weights, costs, draw, overlaps
from dynamo.kv_router.hashing import ROOT, BlockHash, block_hashes, pack, unpack
from dynamo.kv_router.index import Match, PrefixIndex, slots

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


def test_a_block_is_told_by_all_that_is_before_it() -> None:
    assert block_hashes([1, 2, 3, 4], 2)[1] != block_hashes([9, 2, 3, 4], 2)[1]
    assert block_hashes([1, 2], 2) != block_hashes([2, 1], 2)
    assert block_hashes([1, 2], 2, BlockHash(7)) != block_hashes([1, 2], 2)


# prompts from few names, so that they share prefixes; what a cache holds is made of whole prefixes
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=12)
holdings = st.lists(st.tuples(st.integers(0, SLOTS - 1), prompts), max_size=12)


def depths(matches: list[Match]) -> dict[int, int]:
    found = {slot: blocks for blocks, caches in matches for slot in slots(caches)}
    assert [blocks for blocks, _ in matches] == sorted(blocks for blocks, _ in matches)
    assert sum(caches.bit_count() for _, caches in matches) == len(found)  # nobody twice
    return found


def follows(held: set[BlockHash], prompt: list[BlockHash]) -> int:
    return next((i for i, hash in enumerate(prompt) if hash not in held), len(prompt))


@given(holdings, st.lists(st.tuples(prompts, st.integers(0, 2**SLOTS - 1)), min_size=1, max_size=8))
def test_matches_are_the_longest_prefixes(
    held: list[tuple[int, list[int]]], questions: list[tuple[list[int], int]]
) -> None:
    index = PrefixIndex()
    sets: dict[int, set[BlockHash]] = {slot: set() for slot in range(SLOTS)}
    for slot, names in held:
        index.add(slot, chain(*names))
        sets[slot] |= set(chain(*names))
    for names, caches in questions:  # each leaves a hint for the next one
        asked = chain(*names)
        expected = {slot: follows(sets[slot], asked) for slot in range(SLOTS) if caches >> slot & 1}
        assert depths(index.matches(asked, caches)) == {slot: n for slot, n in expected.items() if n}
    assert all(index.blocks(slot) == sets[slot] for slot in range(SLOTS))
    assert len(index) == len(set().union(*sets.values()))


@given(holdings, holdings, prompts, st.integers(0, 2**SLOTS - 1))
def test_blind_caches_are_asked_elsewhere(
    told: list[tuple[int, list[int]]], sent: list[tuple[int, list[int]]], prompt: list[int], blind: int
) -> None:
    index, other = PrefixIndex(), PrefixIndex()
    for into, held in ((index, told), (other, sent)):
        for slot, names in held:
            into.add(slot, chain(*names))
    asked, everybody = chain(*prompt), 2**SLOTS - 1
    found = depths(index.matches(asked, everybody, blind, other))
    one, two = depths(index.matches(asked, everybody)), depths(other.matches(asked, everybody))
    assert found == {s: n for s in range(SLOTS) if (n := (two if blind >> s & 1 else one).get(s, 0))}


@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.sets(st.integers(0, 11))), max_size=8), st.integers(1, 12))
def test_holes_mislead_and_do_no_harm(held: list[tuple[int, set[int]]], length: int) -> None:
    index, names = PrefixIndex(), chain(*[0] * 12)
    for slot, kept in held:
        index.add(slot, [names[i] for i in kept])
    asked = names[:length]
    for _ in range(2):  # the second time with a hint
        found = depths(index.matches(asked, 2**SLOTS - 1))
        assert set(found) == {slot for slot in range(SLOTS) if asked[0] in index.blocks(slot)}
        assert all(asked[blocks - 1] in index.blocks(slot) for slot, blocks in found.items())


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


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=120))
def test_the_lowest_load_is_known_however_loads_change(changes: list[tuple[int, int]]) -> None:
    known = Loads(1.0)
    for slot, decode in changes:
        known.set(slot, 0, decode)
        where, _ = known.cheapest([], 2 ** len(known.weighed) - 1)
        assert known.weighed[where] == min(known.weighed)


@given(
    prompt=st.integers(1, 40),
    loads=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=6),
    depth=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    scale=st.sampled_from([1.0, 0.5, 2.0]),
    credit=st.sampled_from([0.0, 0.5, 1.0]),
    left_out=st.integers(0, 62),
    before=st.lists(st.integers(0, 60), max_size=6),
)
def test_the_cheapest_cache_costs_least(
    prompt: int,
    loads: list[tuple[int, int]],
    depth: list[int],
    scale: float,
    credit: float,
    left_out: int,
    before: list[int],
) -> None:
    known = Loads(scale, credit)
    for slot, decode in enumerate(before[: len(loads)]):
        known.set(slot, 0, decode)
    for slot, (prefill, decode) in enumerate(loads):
        known.set(slot, prefill, decode)
    caches = (2 ** len(loads) - 1) & ~left_out or 1
    found: dict[int, int] = {}
    for slot in range(len(loads)):
        if caches >> slot & 1 and depth[slot] and depth[slot] <= prompt:
            found[depth[slot]] = found.get(depth[slot], 0) | 1 << slot
    matches = sorted(found.items())
    weights = Weights(scale, credit)
    expected = {
        slot: scale * max(prefill + prompt - credit * (depth[slot] if depth[slot] <= prompt else 0), 0)
        + decode
        + prompt
        for slot, (prefill, decode) in enumerate(loads)
        if caches >> slot & 1
    }
    assert costs(prompt, matches, known, caches, weights) == expected
    slot, overlap = known.cheapest(matches, caches)
    assert expected[slot] == min(expected.values())
    assert overlap == overlaps(matches).get(slot, 0)


@given(
    held=st.lists(st.integers(0, 12), min_size=SLOTS, max_size=SLOTS),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    loads=st.lists(st.integers(0, 26), min_size=SLOTS, max_size=SLOTS),
    credit=st.sampled_from([0.0, 0.5, 1.0]),
)
@example(held=[0, 2, 12, 0, 0], lengths=[12], loads=[0, 20, 22, 26, 26], credit=1.0)  # the idlest holds nothing
def test_the_cheapest_is_found_without_following_those_that_cannot_be(
    held: list[int], lengths: list[int], loads: list[int], credit: float
) -> None:
    index, known, names, everybody = PrefixIndex(), Loads(2.0, credit), chain(*range(12)), 2**SLOTS - 1
    for slot, (blocks, load) in enumerate(zip(held, loads, strict=True)):
        index.add(slot, names[:blocks])
        known.set(slot, 0, load)
    for length in lengths:  # each leaves a hint for the next one
        prompt = names[:length]
        exact, spared = index.matches(prompt, everybody), index.matches(prompt, everybody, loads=known)
        assert depths(spared).items() <= depths(exact).items()
        true = costs(length, exact, known, everybody, Weights(2.0, credit))
        slot, overlap = known.cheapest(spared, everybody)
        assert true[slot] == min(true.values())
        assert overlap == depths(exact).get(slot, 0)


def test_a_cache_too_loaded_to_win_is_not_followed() -> None:
    index, known, prompt = PrefixIndex(), Loads(1.0), chain(*range(8))
    for slot, held in ((0, 8), (1, 2)):
        index.add(slot, prompt[:held])
        known.set(slot, 0, 0)
    assert depths(index.matches(prompt, 3)) == {0: 8, 1: 2}  # leaves a hint that they part behind the second block
    known.set(0, 0, 6)  # 6 of load against 6 blocks more: as good as the other at best
    assert depths(index.matches(prompt, 3, loads=known)) == {0: 8, 1: 2}
    known.set(0, 0, 7)
    assert depths(index.matches(prompt, 3, loads=known)) == {1: 2}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 2))
def test_all_equally_cheap_caches_are_drawn(loads: list[int], held: int) -> None:
    known, everybody = Loads(1.0), 2 ** len(loads) - 1
    for slot, load in enumerate(loads):
        known.set(slot, 0, load)
    matches: list[Match] = [(held, 1)] if held else []
    true = costs(2, matches, known, everybody, Weights(1.0))
    drawn = {known.cheapest(matches, everybody)[0] for _ in range(100)}
    assert drawn == {slot for slot, cost in true.items() if cost == min(true.values())}


def test_equal_caches_share_and_temperature_spreads() -> None:
    known = Loads()
    for slot in range(4):
        known.set(slot, 0, 0)
    random.seed(1)
    assert {known.cheapest([], 15) for _ in range(200)} == {(0, 0), (1, 0), (2, 0), (3, 0)}
    known.set(2, 0, 5)
    assert (2, 0) not in {known.cheapest([], 15) for _ in range(200)}
    drawn = [draw(costs(8, [], known, 15, Weights()), 1.0) for _ in range(2000)]
    assert 0 < drawn.count(2) < drawn.count(0)


def test_routed_blocks_are_forgotten_in_time_and_when_the_cache_is_full() -> None:
    routed, one, two = ApproximateIndex(ttl_s=10), chain(1, 2, 3), chain(1, 5)
    routed.add(0, one, now_s=0, capacity=4)
    routed.add(0, two, now_s=5, capacity=4)
    assert set(routed.index.holders) == {*one, *two}
    routed.add(0, chain(7), now_s=6, capacity=4)
    assert one[2] not in routed.index.holders  # the end of the oldest prompt went first
    routed.expire(now_s=12)
    assert set(routed.index.holders) == {*two, *chain(7)}  # their first block was used at 5
    routed.drop(0)
    assert not routed.index.holders

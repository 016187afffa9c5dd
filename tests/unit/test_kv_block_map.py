"""BlockMap against a naive model: whatever an engine does, changes and snapshots lead to the same set."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from dynamo.kv_router.block_map import BlockMap, salted
from dynamo.kv_router.events import BlocksCleared, BlocksRemoved, BlocksStored, Change, EngineEvent
from dynamo.kv_router.hashing import BlockHash, block_hashes, unpack

SIZE = 2
Prompt = tuple[tuple[tuple[int, ...], str], ...]
"""blocks of tokens, each with its salt: as a prefix, the identity of its last block"""


class Engine:
    """Names blocks by a number of its own for each prefix, and for each physical block where `physical`."""

    def __init__(self, *, physical: bool) -> None:
        self.physical = physical
        self.numbers = itertools.count(1000)
        self.names: dict[Prompt, int] = {}
        self.held: Counter[int] = Counter()
        self.prefix_of: dict[int, Prompt] = {}

    def store(self, prompt: Prompt, start: int) -> list[BlocksStored]:
        """The blocks from `start` on, one event for each run of a salt; the blocks before are stored already."""
        events = []
        parent = self.names[prompt[:start]] if start else None
        position = start
        for salt, run in itertools.groupby(prompt[start:], key=lambda block: block[1]):
            tokens, names = [], []
            for block, _ in run:
                position += 1
                name = self._name(prompt[:position])
                self.held[name] += 1
                names.append(name)
                tokens += block
            events.append(BlocksStored(names, parent, tokens, SIZE, salt))
            parent = names[-1]
        return events

    def _name(self, prefix: Prompt) -> int:
        if self.physical or prefix not in self.names:
            self.names[prefix] = next(self.numbers)
            self.prefix_of[self.names[prefix]] = prefix
        return self.names[prefix]

    def prefixes(self) -> set[Prompt]:
        return {self.prefix_of[name] for name, copies in self.held.items() if copies}


def expected(prefix: Prompt) -> BlockHash:
    parent = BlockHash(0)
    for tokens, salt in prefix:
        (parent,) = block_hashes(tokens, SIZE, salted(parent, salt) if salt else parent)
    return parent


def apply(blocks: set[BlockHash], changes: Iterable[Change]) -> None:
    """As a subscriber does; every change must be one."""
    for change in changes:
        for block in unpack(change.hashes):
            assert (block in blocks) is not change.stored
            (blocks.add if change.stored else blocks.remove)(block)


blocks = st.tuples(st.tuples(*[st.integers(0, 1)] * SIZE), st.sampled_from(["", "", "", "a", "b"]))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.lists(blocks, min_size=1, max_size=5).map(tuple), st.integers(0, 4)),
        st.tuples(st.just("remove"), st.lists(st.integers(0, 30), max_size=4)),
        st.tuples(st.sampled_from(["clear", "ask", "ask", "snapshot"])),
    ),
    max_size=40,
)


@given(actions, st.booleans())
def test_changes_from_any_snapshot_lead_to_what_the_engine_holds(steps: Sequence[tuple], physical: bool) -> None:
    engine, block_map = Engine(physical=physical), BlockMap(SIZE)
    followed: list[set[BlockHash]] = [set()]  # subscribers: from the start, and from each snapshot
    for step in steps:
        events: list[EngineEvent] = []
        if step[0] == "store":
            prompt, start = step[1], min(step[2], len(step[1]) - 1)
            while start and not (prompt[:start] in engine.names and engine.held[engine.names[prompt[:start]]]):
                start -= 1
            events += engine.store(prompt, start)
        elif step[0] == "remove":
            there = sorted(engine.held.elements())
            names = [there[index % len(there)] for index in step[1]] if there else []
            names = list((Counter(names) & engine.held).elements())
            engine.held -= Counter(names)
            events.append(BlocksRemoved([*names, 5]))  # and an unknown one
        elif step[0] == "clear":
            engine.held.clear()
            events.append(BlocksCleared())
        block_map.apply(events)
        if step[0] in ("ask", "snapshot"):
            changes = block_map.changes()
            assert all(a.stored is not b.stored for a, b in itertools.pairwise(changes))
            for seen in followed:
                apply(seen, changes)
            if step[0] == "snapshot":
                followed.append(set(block_map.blocks()))
    holds = {expected(prefix) for prefix in engine.prefixes()}
    changes = block_map.changes()
    for seen in followed:
        apply(seen, changes)
        assert seen == holds
    assert set(block_map.blocks()) == holds
    assert len(block_map) == len(holds) == len(block_map.blocks())
    assert block_map.changes() == []


def stored(
    block_map: BlockMap, *names: int, parent: int | None = None, size: int = SIZE, salt: str = ""
) -> list[Change]:
    block_map.apply([BlocksStored(names, parent, list(range(size * len(names))), size, salt)])
    return block_map.changes()


def test_blocks_are_named_as_the_router_names_them() -> None:
    block_map, tokens = BlockMap(4), list(range(100, 112))
    block_map.apply([BlocksStored([1], None, tokens[:4], 4), BlocksStored([2, 3], 1, tokens[4:], 4)])
    (change,) = block_map.changes()
    assert change.stored
    assert unpack(change.hashes) == block_hashes(tokens, 4) == block_map.blocks()


def test_neighbours_of_one_kind_are_one_change() -> None:
    block_map = BlockMap(SIZE)
    block_map.apply(
        [
            BlocksStored([1], None, [1, 2], SIZE),
            BlocksRemoved([9]),  # unknown: no change between the two
            BlocksStored([2], 1, [3, 4], SIZE),
            BlocksRemoved([2]),
            BlocksRemoved([1]),
        ]
    )
    assert [(change.stored, len(unpack(change.hashes))) for change in block_map.changes()] == [(True, 2), (False, 2)]


def test_a_block_behind_an_unknown_one_is_left_out_and_its_removal_does_no_harm() -> None:
    block_map = BlockMap(SIZE)
    assert stored(block_map, 3, 4, parent=2) == []
    assert stored(block_map, 5, parent=4) == []
    block_map.apply([BlocksRemoved([3, 4, 5])])
    assert block_map.changes() == []
    assert len(block_map) == 0


def test_a_copy_behind_an_unknown_block_counts() -> None:
    block_map = BlockMap(SIZE)
    stored(block_map, 1, 2)
    block_map.apply([BlocksStored([2], 77, [2, 3], SIZE), BlocksRemoved([2])])
    assert len(block_map) == 2
    block_map.apply([BlocksRemoved([2])])
    assert len(block_map) == 1


def test_blocks_of_another_size_are_left_out() -> None:
    block_map = BlockMap(SIZE)
    assert stored(block_map, 1, size=SIZE + 1) == []
    block_map.apply([BlocksStored([1, 2], None, [1, 2], SIZE)])  # tokens of one block only
    assert block_map.changes() == []


@given(st.lists(st.sampled_from(["", "a", "b"]), min_size=3, max_size=3))
def test_salted_blocks_match_others_of_the_same_salts_only(salts: list[str]) -> None:
    block_map, plain = BlockMap(SIZE), block_hashes([0, 1] * 3, SIZE)
    for name, salt in enumerate(salts):
        block_map.apply([BlocksStored([name], name - 1 if name else None, [0, 1], SIZE, salt)])
    first_salt = next((index for index, salt in enumerate(salts) if salt), 3)
    assert block_map.blocks()[:first_salt] == plain[:first_salt]
    assert not set(block_map.blocks()[first_salt:]) & set(plain)

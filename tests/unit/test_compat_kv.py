"""Names of ai-dynamo's bindings for routing, as far as they need no server. Expected values are those of its wheel 0.3.2."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from dynamo.compat.router_events import CachePublisher, StoredBlock, stored_event
from dynamo.llm import ApproxKvIndexer, RadixTree, compute_block_hash_for_seq_py


def apply(tree: Any, worker: int, data: Any) -> None:
    tree.apply_event(worker, json.dumps({"event_id": 1, "data": data}).encode())


def store(tree: Any, worker: int, *blocks: tuple[int, int], parent: int | None = None) -> None:
    """Apply an event of blocks given as (engine's hash, hash of the tokens)."""
    stored = [{"block_hash": block, "tokens_hash": tokens} for block, tokens in blocks]
    apply(tree, worker, {"stored": {"parent_hash": parent, "blocks": stored}})


def remove(tree: Any, worker: int, *blocks: int) -> None:
    apply(tree, worker, {"removed": {"block_hashes": blocks}})


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (list(range(8)), 4, [9143094415614847814, 12124091508212882195]),
        ([2**32 - 1, 0, 7, 7, 9], 2, [2890553148568790305, 1876121181760424428]),
        ([42], 1, [10811653421671145151]),
        (list(range(64)), 64, [3480597578098033343]),
        ([1, 2], 3, []),
    ],
)
def test_block_hashes_are_those_of_ai_dynamo(tokens: list[int], size: int, expected: list[int]) -> None:
    assert compute_block_hash_for_seq_py(tokens, size) == expected


def test_block_hashes_of_no_tokens() -> None:
    with pytest.raises(ValueError, match="kv_block_size: expected more than 0, found 0"):
        compute_block_hash_for_seq_py([1], 0)
    with pytest.raises(OverflowError):
        compute_block_hash_for_seq_py([-1], 1)


def test_radix_tree_follows_each_worker() -> None:
    tree = RadixTree()
    store(tree, 7, (100, 1), (101, 2), (102, 3))
    store(tree, -5, (900, 1), (901, 2))
    assert tree.find_matches([1, 2, 3, 4]).scores == {7: 3, -5: 2}
    assert tree.find_matches([1, 2, 9]).scores == {7: 2, -5: 2}
    assert tree.find_matches([2, 3]).scores == {}, "a block is found only after those before it"
    assert tree.find_matches([]).scores == {}
    store(tree, -5, (902, 8), parent=901)
    assert tree.find_matches([1, 2, 8]).scores == {7: 2, -5: 3}
    remove(tree, 7, 102, 12345)
    assert tree.find_matches([1, 2, 3]).scores == {7: 2, -5: 2}
    apply(tree, 7, "cleared")
    assert tree.find_matches([1, 2, 3]).scores == {-5: 2}
    tree.remove_worker(-5)
    tree.clear_all_blocks(7)
    assert tree.find_matches([1, 2, 3]).scores == {}
    store(tree, 7, (100, 1))
    assert tree.find_matches([1, 2, 3]).scores == {7: 1}


def test_radix_tree_leaves_out_blocks_after_an_unknown_one() -> None:
    tree = RadixTree()
    store(tree, 1, (11, 2), parent=10)
    store(tree, 2, (10, 1))
    assert tree.find_matches([1, 2]).scores == {2: 1}
    assert tree.find_matches([2]).scores == {}


def test_radix_tree_ends_early_at_a_single_worker() -> None:
    tree = RadixTree()
    store(tree, 1, (10, 1), (11, 2), (12, 3), (13, 4))
    store(tree, 2, (10, 1))
    assert tree.find_matches([1, 2, 3, 4], early_exit=True).scores == {1: 2, 2: 1}
    assert tree.find_matches([1, 2, 3, 4], True).scores == {1: 2, 2: 1}
    store(tree, 2, (11, 2), (12, 3), (13, 4), parent=10)
    assert tree.find_matches([1, 2, 3, 4], early_exit=True).scores == {1: 4, 2: 4}


def test_radix_tree_counts_look_ups() -> None:
    tree = RadixTree(expiration_duration_secs=100.0)
    store(tree, 1, (10, 1), (11, 2))
    assert [tree.find_matches(blocks).frequencies for blocks in ([1, 2], [1], [1, 2])] == [[], [1], [2, 1]]
    assert RadixTree().find_matches([1]).frequencies == []
    apply(tree, 1, "cleared")
    store(tree, 1, (20, 1))
    assert tree.find_matches([1]).frequencies == [], "those of a block that was removed"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b'{"event_id": 1, "data": "removed"}',
        b'{"event_id": 1, "data": 7}',
        b'{"event_id": 1, "data": {"stored": {"parent_hash": null, "blocks": [{"block_hash": 1, "tokens_hash": -1}]}}}',
    ],
)
def test_radix_tree_rejects_other_bytes(text: bytes) -> None:
    with pytest.raises(ValueError, match="Failed to deserialize KvCacheEvent: "):
        RadixTree().apply_event(1, text)


class Sink:
    """Counts messages."""

    sent = 0

    async def send(self, subject: str, payload: bytes) -> None:
        self.sent += 1

    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> None:
        self.announce = handler


async def test_a_large_cache_does_not_hold_up_the_process_that_sends_it() -> None:
    sink = Sink()
    publisher = CachePublisher(sink, "n", "c", 1)
    await publisher.start()
    for number in range(100):
        publisher.publish(stored_event(0, None, [StoredBlock(number, number)]))
    for listener in (b"a", b"b"):  # before anything is sent: one copy is enough
        sink.announce(listener)
    turns = 0
    async with asyncio.timeout(5):
        while sink.sent < 201:
            await asyncio.sleep(0)
            turns += 1
    assert turns > 90
    await publisher.close()


async def test_approximate_indexer_forgets() -> None:
    component: Any = None  # not used
    indexer = ApproxKvIndexer(component, 4, 0.05)
    tokens = list(range(10))
    assert (await indexer.find_matches_for_request(tokens)).scores == {}
    await indexer.process_routing_decision_for_request(tokens, 77)
    await indexer.process_routing_decision_for_request(tokens[:4] + [9] * 4, 78)
    assert (await indexer.find_matches_for_request(tokens, 0)).scores == {77: 2, 78: 1}
    async with asyncio.timeout(5):
        while (await indexer.find_matches_for_request(tokens)).scores:
            await asyncio.sleep(0.01)
    assert indexer.block_size() == 4


def test_names_of_all_releases_exist() -> None:
    import dynamo.llm

    names = (
        "AggregatedMetrics ApproxKvIndexer DisaggregatedRouter EndpointKvMetrics ForwardPassMetrics KvEventPublisher"
        " KvEventPublisherFromZmq KvEventPublisherFromZmqConfig KvIndexer KvMetricsAggregator KvMetricsPublisher KvStats"
        " OverlapScores RadixTree SpecDecodeStats WorkerMetricsPublisher WorkerStats ZmqKvEventListener"
        " ZmqKvEventPublisher ZmqKvEventPublisherConfig compute_block_hash_for_seq_py"
    )
    assert [name for name in names.split() if not hasattr(dynamo.llm, name)] == []
    with pytest.raises(ImportError, match="cannot import name 'KvIndex' from"):
        from dynamo.llm import KvIndex  # noqa: F401


def test_the_rooms_own_modules_load_none_of_it() -> None:
    program = (
        "import sys; from dynamo.llm import engine, tiny\n"
        "assert not [name for name in sys.modules if name.startswith(('dynamo.compat', 'dynamo.transport'))]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)

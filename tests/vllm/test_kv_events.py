"""KV events of vLLM on the CPU: the prefix hits that they predict are those that vLLM then reports.

vLLM runs in a fork of `vllm_process`, whose environment is set before vLLM is imported.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo.engines.vllm.engine import VllmEngine
from dynamo.engines.vllm.events import KvEventSource, decode_events
from dynamo.kv_router.block_map import BlockMap
from dynamo.kv_router.events import BlocksCleared, BlocksRemoved, BlocksStored, EngineEvent
from dynamo.kv_router.hashing import block_hashes
from dynamo.llm.protocol import GenerateRequest, Sampling
from tests.vllm.fork_server import ForkServer

pytestmark = pytest.mark.vllm

BLOCK = 32
BLOCKS = 48
SLOTS = 128
ARGUMENTS = {
    "block-size": BLOCK,
    "max-model-len": 1024,
    "num-gpu-blocks-override": BLOCKS,
    "max-num-seqs": SLOTS,
    "enforce-eager": True,
    "dtype": "float32",
    "kv-cache-memory-bytes": 64 << 20,
}


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


# -- with vLLM


@pytest.fixture(scope="module")
def found(vllm_process: ForkServer) -> Any:
    return vllm_process.run("tests.vllm.test_kv_events:watch")


def test_block_map_predicts_every_prompts_hit(found: Any) -> None:
    assert [hit["cached"] for hit in found["hits"]] == [hit["predicted"] for hit in found["hits"]]
    assert sum(hit["predicted"] > 0 for hit in found["hits"]) > 10
    assert found["removed"] > BLOCKS, "the cache was too large: nothing was evicted"


def test_block_map_is_right_after_concurrent_requests(found: Any) -> None:
    assert [hit["cached"] for hit in found["after"]] == [hit["predicted"] for hit in found["after"]]


def test_salted_blocks_are_mapped_and_match_no_plain_prompt(found: Any) -> None:
    assert found["salted"] == {"blocks": 3, "plain_hit": 0, "predicted": 0}


def test_reset_empties_the_block_map(found: Any) -> None:
    assert found["reset"] == 0


def test_engine_info_and_stats_are_those_of_the_engine_core(found: Any) -> None:
    assert found["info"] == [1024, BLOCK, BLOCKS, 1, SLOTS, ""]
    (stats,) = found["stats"]
    assert stats["running"] == stats["waiting"] == 0
    assert stats["prefix_hits"] >= sum(hit["cached"] for hit in found["hits"])
    assert stats["prefix_queries"] > stats["prefix_hits"]


def test_the_rank_reaches_vllm(found: Any) -> None:
    assert found["rank 0"] == 1
    assert "rank" in found["rank 7"]


def test_sockets_are_removed(found: Any) -> None:
    assert found["left"] is False


def test_events_of_data_parallel_ranks_are_separate(vllm_process: ForkServer) -> None:
    info = [1024, BLOCK, BLOCKS, 2, SLOTS, ""]
    found = vllm_process.run("tests.vllm.test_kv_events:watch_ranks")
    assert found == {"info": info, "blocks": [3, 6], "queries": [100, 300]}


async def watch() -> dict[str, Any]:
    engine = VllmEngine("dynamo-tiny", ARGUMENTS, lambda _: None)
    block_map = BlockMap(BLOCK)
    seen = dict.fromkeys((BlocksStored, BlocksRemoved, BlocksCleared), 0)

    def listen(rank: int, events: Sequence[EngineEvent]) -> None:
        assert rank == 0
        for event in events:
            seen[type(event)] += len(getattr(event, "hashes", "x"))
        block_map.apply(events)

    assert engine.kv_events(listen)
    info = await engine.start()
    directory = Path(engine._options.private_events["endpoint"].removeprefix("ipc://")).parent  # type: ignore[index]
    assert directory.stat().st_mode & 0o077 == 0

    async def send(tokens: list[int], max_tokens: int = 8, rank: int | None = None) -> tuple[int, list[int]]:
        """Return (cached tokens, all tokens whose KV was computed)."""
        request = GenerateRequest(tokens, Sampling(max_tokens=max_tokens, ignore_eos=True), rank=rank)
        deltas = [delta async for delta in engine.generate(request)]
        generated = [token for delta in deltas for token in delta.token_ids]
        return deltas[0].cached_tokens or 0, [*tokens, *generated[:-1]]

    def predicted(tokens: list[int]) -> int:
        """Return the prefix hit to expect, in tokens; vLLM always computes the last prompt token."""
        held = set(block_map.blocks())
        hits = itertools.takewhile(held.__contains__, block_hashes(tokens[:-1], BLOCK))
        return BLOCK * sum(1 for _ in hits)

    async def mapped(*computed: list[int]) -> None:
        """Wait until the map has all full blocks of these tokens: vLLM publishes them after the step."""
        await until(lambda: all(set(block_hashes(c, BLOCK)) <= set(block_map.blocks()) for c in computed))

    async def compare(prompts: list[list[int]]) -> list[dict[str, int]]:
        hits = []
        for prompt in prompts:
            expected = predicted(prompt)
            cached, computed = await send(prompt, dice.randrange(1, 40))
            hits.append({"predicted": expected, "cached": cached})
            await mapped(computed)
        return hits

    dice = random.Random(5)
    stems = [[dice.randrange(10, 1000) for _ in range(n * BLOCK + 7)] for n in (2, 4, 6)]
    prompts = [
        dice.choice(stems)[: dice.randrange(BLOCK, 7 * BLOCK)] + [dice.randrange(10, 1000)] * dice.randrange(1, 150)
        for _ in range(25)
    ]
    result: dict[str, Any] = {"hits": await compare([*prompts, *dice.choices(prompts, k=25)])}
    result["removed"] = seen[BlocksRemoved]
    same = prompts[0]
    together = await asyncio.gather(*(send(p, 4) for p in [same, same, *prompts[1:4]]))  # blocks stored twice
    await mapped(*(computed for _, computed in together))
    result["after"] = await compare(dice.choices(prompts, k=25))

    await engine._llm.reset_prefix_cache()
    await send([5, 6], 1)  # vLLM publishes with its next step
    await until(lambda: seen[BlocksCleared] == 1)
    result["reset"] = len(block_map)

    plain = [dice.randrange(10, 1000) for _ in range(3 * BLOCK + 1)]
    from vllm import SamplingParams

    async for _ in engine._llm.generate(
        {"prompt_token_ids": plain, "cache_salt": "tenant"}, SamplingParams(max_tokens=1), "s"
    ):
        pass
    await until(lambda: len(block_map) == 3)
    result["salted"] = {"blocks": len(block_map), "predicted": predicted(plain)}
    result["salted"]["plain_hit"], computed = await send(plain)
    await mapped(computed)
    result["rank 0"] = len((await send([5, 6], 1, rank=0))[1]) - 1
    try:
        await send([5, 6], 1, rank=7)
        result["rank 7"] = "taken"
    except Exception as error:
        result["rank 7"] = str(error)
    result["info"], result["stats"] = list(info), [stats._asdict() for stats in engine.stats()]
    await engine.stop()
    result["left"] = directory.exists()
    return result


async def watch_ranks() -> dict[str, Any]:
    engine, block_maps = VllmEngine("dynamo-tiny", {**ARGUMENTS, "data-parallel-size": 2}, lambda _: None), []
    assert engine.kv_events(lambda rank, events: block_maps[rank].apply(events))
    info = await engine.start()
    block_maps += [BlockMap(info.kv_block_size) for _ in range(info.ranks)]
    for rank, token in ((0, 5), (1, 6), (1, 6), (1, 7)):
        request = GenerateRequest([token] * 100, Sampling(max_tokens=2, ignore_eos=True), rank=rank)
        async for _ in engine.generate(request):
            pass
    await until(lambda: [len(block_map) for block_map in block_maps] == [3, 6])
    queries = [stats.prefix_queries for stats in engine.stats()]
    await engine.stop()
    return {"info": list(info), "blocks": [len(block_map) for block_map in block_maps], "queries": queries}


# -- layouts and lost messages


def payload(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([0.5, events, 0])


def stored(*hashes: Any, parent: Any = None, size: int = 2, **more: Any) -> dict[str, Any]:
    tokens = list(range(size * len(hashes)))
    fields = {"block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens, "block_size": size}
    return {"type": "BlockStored", "lora_id": None, "medium": "GPU", "lora_name": None, **fields, **more}


def removed(*hashes: Any, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", **more}


def test_decoding_of_both_layouts_and_both_kinds_of_hashes() -> None:
    new = {"ownership": None, "session_id": "s", "kv_cache_spec_kind": "full_attention", "group_idx": 0}
    for event in (stored(7, 8, parent=6), stored(b"\0\7", b"\0\10", parent=b"\0\6", **new)):
        assert decode_events(payload(event, removed(7))) == [
            BlocksStored([7, 8], 6, [0, 1, 2, 3], 2),
            BlocksRemoved([7]),
        ]
    assert decode_events(payload({"type": "AllBlocksCleared"})) == [BlocksCleared()]


def test_decoding_of_events_that_are_arrays() -> None:
    """The layout of vLLM of 2025, and of SGLang."""
    events: list[Any] = [
        ["BlockStored", [7, 8], 6, [0, 1, 2, 3], 2, None],
        ["BlockStored", [9], None, [4, 5], 2, None, "CPU"],
        ["BlockRemoved", [7]],
        ["BlockRemoved", [8], "CPU"],
        ["AllBlocksCleared"],
    ]
    expected = [BlocksStored([7, 8], 6, [0, 1, 2, 3], 2), BlocksRemoved([7]), BlocksCleared()]
    assert decode_events(msgspec.msgpack.encode([0.5, events])) == expected
    assert decode_events(msgspec.msgpack.encode([0.5, events, 0])) == expected
    for broken in ([["BlockMoved", 1]], [["BlockStored", [7]]], [[7]], [[[7]]], ["AllBlocksCleared"], 7):
        with pytest.raises(msgspec.DecodeError):
            decode_events(msgspec.msgpack.encode([0.5, broken]))


def test_events_of_other_groups_and_media_are_ignored() -> None:
    others: list[dict[str, Any]] = [{"group_idx": 1}, {"medium": "CPU"}, {"medium": "STORAGE"}]
    for other in others:
        assert decode_events(payload(stored(1, **other), removed(1, **other))) == []


def test_extra_keys_become_salts_block_by_block() -> None:
    keys = [["tenant"], None, [["image", 3]], [["image", 1]]]
    first, second, third, fourth = decode_events(payload(stored(1, 2, 3, 4, parent=9, extra_keys=keys)))
    assert isinstance(first, BlocksStored)
    assert (first.hashes, first.parent, first.token_ids) == ([1], 9, [0, 1])
    assert second == BlocksStored([2], 1, [2, 3], 2)
    assert isinstance(third, BlocksStored)
    assert isinstance(fourth, BlocksStored)
    assert len({first.salt, third.salt, fourth.salt, ""}) == 4
    (lora,) = decode_events(payload(stored(1, 2, lora_name="a", extra_keys=[["a"], ["a"]])))
    assert isinstance(lora, BlocksStored)
    assert lora.salt not in ("", first.salt)


@pytest.mark.parametrize(
    ("given", "can"),
    [
        ({"enable_kv_cache_events": True}, True),
        ('{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5600"}', True),
        ({"enable_kv_cache_events": True, "endpoint": "ipc:///run/kv"}, True),
        ({"enable_kv_cache_events": True, "endpoint": "tcp://collector:5557"}, False),
        ({"enable_kv_cache_events": True, "endpoint": "tcp://*:0"}, False),
        ({"enable_kv_cache_events": True, "publisher": "null"}, False),
        ({"enable_kv_cache_events": False}, False),
        ("{", False),
    ],
)
def test_users_configuration_is_subscribed_to_if_possible(given: Any, can: bool) -> None:
    assert VllmEngine("m", {"kv-events-config": given}, print).kv_events(lambda *_: None) is can


@pytest.mark.parametrize("arguments", [{"enable-prefix-caching": False}, {"enable_prefix_caching": False}])
def test_no_events_without_prefix_caching(arguments: dict[str, Any]) -> None:
    assert not VllmEngine("m", arguments, print).kv_events(lambda *_: None)


class Publisher:
    """Publishes as an engine core does. A `lost` message is not sent, a `forgotten` one is not replayed."""

    def __init__(self, directory: Path, *, replays: bool = True, rank: int = 0) -> None:
        import zmq.asyncio

        self.context = zmq.asyncio.Context()
        suffix = f"_dp{rank}" if rank else ""
        self.endpoint = f"ipc://{directory}/inproc"
        self.replay_endpoint = f"ipc://{directory}/replay-inproc"
        self.messages = self.context.socket(zmq.XPUB)
        self.replay = self.context.socket(zmq.ROUTER)
        self.messages.bind(self.endpoint + suffix)
        self.replay.bind(self.replay_endpoint + suffix)
        self.sent: list[tuple[int, bytes]] = []
        self.numbers = itertools.count()
        self.answering = asyncio.ensure_future(self._answer()) if replays else None

    async def subscribed(self) -> None:
        await self.messages.recv()

    async def publish(self, *events: dict[str, Any], lost: bool = False, forgotten: bool = False) -> None:
        number, data = next(self.numbers), payload(*events)
        if not forgotten:
            self.sent.append((number, data))
        if not lost:
            await self.messages.send_multipart([b"", number.to_bytes(8, "big"), data])

    async def _answer(self) -> None:
        while True:
            client, _, start = await self.replay.recv_multipart()
            for number, data in [*self.sent]:
                if number >= int.from_bytes(start, "big"):
                    await self.replay.send_multipart([client, b"", b"", number.to_bytes(8, "big"), data])
            await self.replay.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])


Listen = Callable[..., tuple[Publisher, list[EngineEvent]]]


@pytest.fixture
async def listen(tmp_path: Path) -> AsyncIterator[Listen]:
    opened: list[Any] = []

    def connect(*, rank: int = 0, asks: bool = True, **options: Any) -> tuple[Publisher, list[EngineEvent]]:
        publisher, events = Publisher(tmp_path, rank=rank, **options), list[EngineEvent]()

        def take(number: int, found: Sequence[EngineEvent]) -> None:
            assert number == rank
            events.extend(found)

        replay = publisher.replay_endpoint if asks else None
        opened.extend((publisher, KvEventSource(rank, publisher.endpoint, replay, take)))
        return publisher, events

    yield connect
    for one in opened:
        if isinstance(one, Publisher):
            if one.answering is not None:
                one.answering.cancel()
            one.context.destroy(linger=0)
        else:
            one.close()


@pytest.mark.parametrize("rank", [0, 1])
async def test_burst_arrives_completely_and_in_order(listen: Listen, rank: int) -> None:
    publisher, events = listen(rank=rank)
    await publisher.subscribed()
    for number in range(1000):
        await publisher.publish(stored(number))
    await until(lambda: len(events) == 1000)
    assert [event.hashes for event in events if isinstance(event, BlocksStored)] == [[n] for n in range(1000)]


async def test_missing_messages_are_replayed(listen: Listen) -> None:
    publisher, events = listen()
    for number in range(3):
        await publisher.publish(stored(number), lost=True)  # before the subscription
    await publisher.subscribed()
    for number in range(3, 50):
        await publisher.publish(stored(number), lost=number % 7 in (2, 3))
    await publisher.publish(stored(50))
    await until(lambda: len(events) == 51)
    assert [event.hashes for event in events if isinstance(event, BlocksStored)] == [[n] for n in range(51)]


@pytest.mark.parametrize("options", [{}, {"asks": False}, {"replays": False}])
async def test_unrecoverable_loss_clears_the_cache(
    listen: Listen, options: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    publisher, events = listen(**options)
    await publisher.subscribed()
    await publisher.publish(stored(0))
    await publisher.publish(removed(0), lost=True, forgotten=True)
    await publisher.publish(stored(2))
    await publisher.publish(stored(3))
    await until(lambda: len(events) == 4)
    assert [type(event) for event in events] == [BlocksStored, BlocksCleared, BlocksStored, BlocksStored]
    assert "1 messages lost" in caplog.text


async def test_a_restarted_engine_begins_with_an_empty_cache(listen: Listen) -> None:
    publisher, events = listen(asks=False)
    await publisher.subscribed()
    for number in range(3):
        await publisher.publish(stored(number))
    publisher.numbers = itertools.count()
    await publisher.publish(stored(7))
    await publisher.publish(stored(8))
    await until(lambda: len(events) == 6)
    assert [type(event) for event in events[3:]] == [BlocksCleared, BlocksStored, BlocksStored]


async def test_unreadable_message_counts_as_lost(listen: Listen) -> None:
    publisher, events = listen()
    await publisher.subscribed()
    await publisher.publish({"type": "BlockMoved"})
    await publisher.publish(stored(1))
    await until(lambda: len(events) == 2)
    assert isinstance(events[0], BlocksCleared)

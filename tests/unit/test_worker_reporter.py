"""What a worker tells: its KV changes, its load, its snapshots; in memory, with an engine that does as it is told."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from components.worker import VllmWorker
from dynamo.errors import EngineError, TransportError
from dynamo.kv_router.events import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    KvEvents,
    KvSnapshot,
    SnapshotRequest,
    WorkerLoad,
)
from dynamo.kv_router.hashing import BlockHash, block_hashes, unpack
from dynamo.llm import worker_reporter
from dynamo.llm.engine import EngineInfo, EngineStats, KvListener
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.rpc.metrics import ProcessMetrics
from dynamo.sdk import ServiceContext, Stream
from dynamo.streams import Channel

SIZE = 4
WORKER = 77


class FakeEngine:
    def __init__(self, ranks: int = 1, *, tells: bool = True) -> None:
        self.ranks, self.tells = ranks, tells
        self.listener: KvListener | None = None
        self.running: list[tuple[GenerateRequest, Channel[Delta]]] = []
        self.cancelled = self.stopped = 0

    def kv_events(self, listener: KvListener) -> bool:
        self.listener = listener if self.tells else None
        return self.tells

    async def start(self) -> EngineInfo:
        return EngineInfo(1000, SIZE, 500, self.ranks)

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        channel: Channel[Delta] = Channel()
        channel.on_cancel = lambda: setattr(self, "cancelled", self.cancelled + 1)
        self.running.append((request, channel))
        return Stream(channel)

    def stats(self) -> list[EngineStats]:
        return [EngineStats(len(self.running), rank, 0.25, 100, 50) for rank in range(self.ranks)]

    async def check_health(self) -> None:
        return None

    async def stop(self) -> None:
        self.stopped += 1

    def store(self, first: int, blocks: int, rank: int = 0) -> list[BlockHash]:
        """A prompt of its own: names and tokens count from `first`."""
        assert self.listener is not None
        tokens = list(range(first, first + blocks * SIZE))
        self.listener(rank, [BlocksStored(range(first, first + blocks), None, tokens, SIZE)])
        return block_hashes(tokens, SIZE)


class FakeRuntime:
    instance_id = WORKER

    def __init__(self) -> None:
        self.metrics = ProcessMetrics(WORKER, {})

    async def connect(self) -> None: ...
    async def publish(self, key: str, card: Any) -> None: ...


class Heard:
    def __init__(self) -> None:
        self.kv: list[KvEvents] = []
        self.load: list[WorkerLoad] = []


Serve = Callable[..., Any]


@pytest.fixture
async def serve(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Serve]:
    """Starts a worker of that engine as a process of a graph does; gives it with what its topics say."""
    monkeypatch.setattr(
        "dynamo.sdk.context._current", ServiceContext("VllmWorker", "dynamo", 1, 1, FakeRuntime(), print)
    )
    started: list[VllmWorker] = []

    async def start(engine: FakeEngine, **settings: Any) -> tuple[VllmWorker, Heard]:
        worker = VllmWorker(model="dynamo-tiny", engine="mock", **{"router": "kv", **settings})
        worker.engine = engine  # type: ignore[assignment]
        heard = Heard()
        await worker.kv_events.subscribe(heard.kv.append)
        await worker.load.subscribe(heard.load.append)
        started.append(worker)
        await worker.start()
        return worker, heard

    yield start
    for worker in started:
        await worker.stop()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def collect(worker: VllmWorker) -> list[KvSnapshot]:
    return [part async for part in worker.kv_snapshot(SnapshotRequest())]


def replay(messages: Sequence[KvEvents], rank: int = 0, after: int = 0, held: Sequence[BlockHash] = ()) -> set[int]:
    """As a router: what a rank holds after all of its messages behind `after`."""
    blocks: set[int] = set(held)
    mine = [message for message in messages if message.rank == rank]
    assert [message.sequence for message in mine] == list(range(1, len(mine) + 1))
    for message in mine[after:]:
        assert message.worker == WORKER
        for change in message.changes:
            hashes = unpack(change.hashes)
            blocks = blocks | set(hashes) if change.stored else blocks - set(hashes)
    return blocks


# -- KV events


async def test_changes_are_published_in_order_and_coalesced(serve: Serve) -> None:
    engine = FakeEngine()
    _, heard = await serve(engine)
    first = engine.store(0, 5)
    await until(lambda: heard.kv)
    assert [(c.stored, unpack(c.hashes)) for c in heard.kv[0].changes] == [(True, first)]
    held = set(first)
    for number in range(1, 200):
        held |= set(engine.store(number * 1000, 3))
    assert engine.listener is not None
    engine.listener(0, [BlocksRemoved([0, 1])])
    await until(lambda: replay(heard.kv) == held - set(first[:2]))
    assert len(heard.kv) < 10
    engine.listener(0, [BlocksCleared()])
    await until(lambda: replay(heard.kv) == set())


async def test_a_burst_is_split_into_messages_that_nats_takes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_reporter, "MESSAGE_HASHES", 10)
    engine = FakeEngine()
    _, heard = await serve(engine)
    held = {block for prompt in range(7) for block in engine.store(prompt * 1000, 5)}
    assert engine.listener is not None
    engine.listener(0, [BlocksRemoved([1000, 1001])])
    held -= set(block_hashes(range(1000, 1000 + 2 * SIZE), SIZE))
    engine.store(50_000, 1)
    held |= set(block_hashes(range(50_000, 50_000 + SIZE), SIZE))
    await until(lambda: replay(heard.kv) == held)
    assert [sum(len(unpack(c.hashes)) for c in m.changes) for m in heard.kv] == [10, 10, 10, 8]
    assert [c.stored for c in heard.kv[-1].changes] == [True, False, True]


async def test_a_snapshot_and_the_messages_behind_it_give_the_same_set(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_reporter, "SNAPSHOT_HASHES", 4)
    engine = FakeEngine()
    worker, heard = await serve(engine)
    engine.store(0, 4)
    await until(lambda: heard.kv)
    engine.store(1000, 5)  # not published yet
    parts = await collect(worker)
    assert [(len(unpack(part.hashes)), part.last) for part in parts] == [(4, False), (4, False), (1, True)]
    assert {(part.worker, part.rank, part.sequence, part.block_size) for part in parts} == {(WORKER, 0, 2, SIZE)}
    assert engine.listener is not None
    engine.listener(0, [BlocksRemoved([3, 1004])])
    await until(lambda: len(heard.kv) == 3)
    snapshot = [block for part in parts for block in unpack(part.hashes)]
    assert replay(heard.kv, after=2, held=snapshot) == replay(heard.kv)
    assert len(replay(heard.kv)) == 7


async def test_ranks_have_caches_and_sequences_of_their_own(serve: Serve) -> None:
    engine = FakeEngine(ranks=3)
    worker, heard = await serve(engine)
    held = {0: set(engine.store(0, 2)), 1: set[BlockHash](), 2: set(engine.store(0, 3, rank=2))}
    await until(lambda: {message.rank for message in heard.kv} == {0, 2})
    assert {rank: replay(heard.kv, rank) for rank in held} == held
    parts = await collect(worker)
    assert [(part.rank, part.sequence, len(unpack(part.hashes)), part.last) for part in parts] == [
        (0, 1, 2, True),
        (1, 0, 0, True),
        (2, 1, 3, True),
    ]


async def test_what_cannot_be_published_leaves_a_gap(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_reporter, "MESSAGE_HASHES", 2)
    engine = FakeEngine()
    worker, heard = await serve(engine)
    send = worker.activity._publish_kv  # type: ignore[union-attr]
    worker.activity._publish_load = worker.activity._publish_kv = _fails  # type: ignore[union-attr]
    engine.store(0, 10)
    worker.generate(request("a")).cancel()
    await until(lambda: worker.activity._ranks[0].sequence == 5)  # type: ignore[union-attr]
    await asyncio.sleep(0.05)
    worker.activity._publish_kv = send  # type: ignore[union-attr]
    late = engine.store(1000, 2)
    await until(lambda: heard.kv)
    assert (heard.kv[0].sequence, unpack(heard.kv[0].changes[0].hashes)) == (6, late)
    (part, *_) = await collect(worker)
    assert len(unpack(part.hashes)) == 12


async def _fails(message: object) -> None:
    raise TransportError("the NATS server is away")


async def test_a_publisher_that_hangs_holds_nothing_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_reporter, "PUBLISH_TIMEOUT_S", 0.01)
    engine = FakeEngine()
    worker, heard = await serve(engine)
    publish = worker.activity._publish_kv  # type: ignore[union-attr]

    async def hangs(message: object) -> None:
        await asyncio.sleep(1000)

    worker.activity._publish_kv = hangs  # type: ignore[union-attr]
    engine.store(0, 1)
    await until(lambda: worker.activity._ranks[0].sequence == 1)  # type: ignore[union-attr]
    worker.activity._publish_kv = publish  # type: ignore[union-attr]
    engine.store(1000, 1)
    await until(lambda: heard.kv)
    assert not worker.activity._ranks[0].outbox  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "listens"),
    [
        ({"router": "kv"}, True),
        ({"router": "kv-load"}, True),
        ({"router": "round-robin"}, False),
        ({"router": "random", "kv_events": True}, True),
        ({"router": "kv", "kv_events": False}, False),
    ],
)
async def test_events_are_collected_where_they_are_wanted(serve: Serve, settings: Any, listens: bool) -> None:
    engine = FakeEngine()
    _, heard = await serve(engine, **settings)
    assert (engine.listener is not None) is listens
    await until(lambda: heard.load)
    assert heard.load[0].kv_events is listens


async def test_without_a_prefix_cache_one_line_says_so(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    _, heard = await serve(FakeEngine(tells=False), **{"enable-prefix-caching": False})
    await until(lambda: heard.load)
    assert not heard.load[0].kv_events
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "enable-prefix-caching is false" in record.getMessage()


# -- load


def request(request_id: str, prompt: int = 10, **more: Any) -> GenerateRequest:
    return GenerateRequest([1] * prompt, Sampling(), request_id, **more)


async def test_load_follows_a_request_through_its_life(serve: Serve) -> None:
    engine = FakeEngine()
    worker, heard = await serve(engine)
    engine.store(0, 2)
    await until(lambda: heard.load and heard.kv)
    stream = worker.generate(request("a", 10, expected_hit=4))
    await until(lambda: heard.load[-1].accepted == ["a"])
    assert heard.load[-1] == WorkerLoad(WORKER, 0, 1, 0, 2, 3, 500, 0.25, 100, 50, ["a"], 1, SIZE, True)
    channel = engine.running[0][1]
    told = len(heard.load)
    channel.push(Delta("x", [1], prompt_tokens=10, cached_tokens=0))
    await until(lambda: len(heard.load) > told)
    assert (heard.load[-1].prefill_blocks, heard.load[-1].decode_blocks, heard.load[-1].accepted) == (0, 3, [])
    channel.push(Delta("xyz", [1, 2, 3]))
    assert worker.activity is not None
    assert worker.activity.load(0).decode_blocks == 4  # 14 tokens
    channel.end()
    await until(lambda: heard.load[-1].decode_blocks == 0)
    assert [delta.text async for delta in stream] == ["x", "xyz"]


@pytest.mark.parametrize("end", ["cancel", "drop", "error"])
async def test_however_a_request_ends_its_load_goes(serve: Serve, end: str) -> None:
    engine = FakeEngine()
    worker, heard = await serve(engine)
    stream: Stream[Delta] | None = worker.generate(request("a"))
    assert stream is not None
    await until(lambda: heard.load and heard.load[-1].prefill_blocks == 3)
    if end == "cancel":
        stream.cancel()
    elif end == "error":
        engine.running[0][1].end(EngineError("broken"))
        with pytest.raises(EngineError, match="broken"):
            await anext(stream)
    stream = None
    await until(lambda: (heard.load[-1].prefill_blocks, heard.load[-1].decode_blocks) == (0, 0))
    assert engine.cancelled == (end != "error")


async def test_load_is_told_every_second_and_not_for_every_request(serve: Serve) -> None:
    engine = FakeEngine()
    worker, heard = await serve(engine)
    began = time.monotonic()
    streams = [worker.generate(request(f"r{number}")) for number in range(500)]
    await until(lambda: sum(len(load.accepted) for load in heard.load) == 500)
    assert len(heard.load) <= 3 + (time.monotonic() - began) / worker_reporter.LOAD_EVERY_S
    for stream in streams:
        stream.cancel()
    await until(lambda: heard.load[-1].decode_blocks == 0)
    quiet = len(heard.load)
    await until(lambda: len(heard.load) > quiet)
    assert time.monotonic() - began > 0.9


async def test_a_request_goes_to_its_rank_or_to_the_one_with_fewest(serve: Serve) -> None:
    engine = FakeEngine(ranks=2)
    worker, heard = await serve(engine)
    streams = [worker.generate(request("a", rank=1)), worker.generate(request("b")), worker.generate(request("c"))]
    assert [asked.rank for asked, _ in engine.running] == [1, 0, 0]
    await until(lambda: sum(len(load.accepted) for load in heard.load) == 3)
    assert {load.rank: load.accepted for load in heard.load if load.accepted} == {1: ["a"], 0: ["b", "c"]}
    assert heard.load[-1].waiting == heard.load[-1].rank  # its own statistics
    worker.generate(request("d", rank=9))  # the engine refuses it
    assert engine.running[-1][0].rank == 9
    assert len(streams) == 3


# -- with and without a graph


async def test_plain_python_publishes_nothing() -> None:
    engine = FakeEngine()
    worker = VllmWorker(model="dynamo-tiny", engine="mock", router="kv")
    worker.engine = engine  # type: ignore[assignment]
    tasks = asyncio.all_tasks()
    await worker.start()
    assert asyncio.all_tasks() == tasks
    assert engine.listener is None
    stream = worker.generate(request("a"))
    engine.running[0][1].push(Delta("x", [1]))
    assert (await anext(stream)).text == "x"
    assert await collect(worker) == []
    await worker.stop()


async def test_stop_ends_every_task(serve: Serve) -> None:
    before = asyncio.all_tasks()
    worker, _ = await serve(FakeEngine())
    assert len(asyncio.all_tasks() - before) == 2
    await worker.stop()
    assert asyncio.all_tasks() == before

"""A worker's KV events, load and snapshots, in memory, with a scripted engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
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
    def __init__(self, ranks: int = 1, *, emits_kv_events: bool = True) -> None:
        self.ranks = ranks
        self.emits_kv_events = emits_kv_events
        self.listener: KvListener | None = None
        self.running: list[tuple[GenerateRequest, Channel[Delta]]] = []
        self.cancelled = self.stopped = 0

    def kv_events(self, listener: KvListener) -> bool:
        self.listener = listener if self.emits_kv_events else None
        return self.emits_kv_events

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
        """Report a stored prompt whose block names and tokens count from `first`."""
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
    async def listen(self, subject: str, handler: Callable[[bytes], None]) -> None: ...


class Received:
    def __init__(self) -> None:
        self.kv: list[KvEvents] = []
        self.load: list[WorkerLoad] = []


Serve = Callable[..., Any]


@pytest.fixture
async def serve(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Serve]:
    """Return a function that starts a worker as a process of a graph does, and returns it with its topics' messages."""
    monkeypatch.setattr(
        "dynamo.sdk.context._current", ServiceContext("VllmWorker", "dynamo", 1, 1, FakeRuntime(), print)
    )
    started: list[VllmWorker] = []

    async def start(engine: FakeEngine, **settings: Any) -> tuple[VllmWorker, Received]:
        worker = VllmWorker(model="dynamo-tiny", engine="mock", **{"router": "kv", **settings})
        worker.engine = engine  # type: ignore[assignment]
        received = Received()
        await worker.kv_events.subscribe(received.kv.append)
        await worker.load.subscribe(received.load.append)
        started.append(worker)
        await worker.start()
        return worker, received

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
    """Return the blocks of a rank after all of its messages behind `after`, as a router computes them."""
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
    _, received = await serve(engine)
    first = engine.store(0, 5)
    await until(lambda: received.kv)
    assert [(c.stored, unpack(c.hashes)) for c in received.kv[0].changes] == [(True, first)]
    held = set(first)
    for number in range(1, 200):
        held |= set(engine.store(number * 1000, 3))
    assert engine.listener is not None
    engine.listener(0, [BlocksRemoved([0, 1])])
    await until(lambda: replay(received.kv) == held - set(first[:2]))
    assert len(received.kv) < 10
    engine.listener(0, [BlocksCleared()])
    await until(lambda: replay(received.kv) == set())


async def test_a_burst_is_split_into_messages_that_nats_accepts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_reporter, "MESSAGE_HASHES", 10)
    engine = FakeEngine()
    _, received = await serve(engine)
    held = {block for prompt in range(7) for block in engine.store(prompt * 1000, 5)}
    assert engine.listener is not None
    engine.listener(0, [BlocksRemoved([1000, 1001])])
    held -= set(block_hashes(range(1000, 1000 + 2 * SIZE), SIZE))
    engine.store(50_000, 1)
    held |= set(block_hashes(range(50_000, 50_000 + SIZE), SIZE))
    await until(lambda: replay(received.kv) == held)
    assert [sum(len(unpack(c.hashes)) for c in m.changes) for m in received.kv] == [10, 10, 10, 8]
    assert [c.stored for c in received.kv[-1].changes] == [True, False, True]


async def test_a_snapshot_and_the_messages_behind_it_give_the_same_set(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_reporter, "SNAPSHOT_HASHES", 4)
    engine = FakeEngine()
    worker, received = await serve(engine)
    engine.store(0, 4)
    await until(lambda: received.kv)
    engine.store(1000, 5)  # not published yet
    parts = await collect(worker)
    assert [(len(unpack(part.hashes)), part.last) for part in parts] == [(4, False), (4, False), (1, True)]
    assert {(part.worker, part.rank, part.sequence, part.block_size) for part in parts} == {(WORKER, 0, 2, SIZE)}
    assert engine.listener is not None
    engine.listener(0, [BlocksRemoved([3, 1004])])
    await until(lambda: len(received.kv) == 3)
    snapshot = [block for part in parts for block in unpack(part.hashes)]
    assert replay(received.kv, after=2, held=snapshot) == replay(received.kv)
    assert len(replay(received.kv)) == 7


async def test_each_rank_has_its_own_cache_and_sequence(serve: Serve) -> None:
    engine = FakeEngine(ranks=3)
    worker, received = await serve(engine)
    held = {0: set(engine.store(0, 2)), 1: set[BlockHash](), 2: set(engine.store(0, 3, rank=2))}
    await until(lambda: {message.rank for message in received.kv} == {0, 2})
    assert {rank: replay(received.kv, rank) for rank in held} == held
    parts = await collect(worker)
    assert [(part.rank, part.sequence, len(unpack(part.hashes)), part.last) for part in parts] == [
        (0, 1, 2, True),
        (1, 0, 0, True),
        (2, 1, 3, True),
    ]


async def test_messages_that_cannot_be_published_leave_a_gap(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_reporter, "MESSAGE_HASHES", 2)
    engine = FakeEngine()
    worker, received = await serve(engine)
    topic = worker.reporter._kv_topic  # type: ignore[union-attr]
    worker.reporter._load_topic = worker.reporter._kv_topic = SimpleNamespace(publish=_fails)  # type: ignore[union-attr]
    engine.store(0, 10)
    worker.generate(request("a")).cancel()
    await until(lambda: worker.reporter._ranks[0].sequence == 5)  # type: ignore[union-attr]
    await asyncio.sleep(0.05)
    worker.reporter._kv_topic = topic  # type: ignore[union-attr]
    late = engine.store(1000, 2)
    await until(lambda: received.kv)
    assert (received.kv[0].sequence, unpack(received.kv[0].changes[0].hashes)) == (6, late)
    (part, *_) = await collect(worker)
    assert len(unpack(part.hashes)) == 12


async def _fails(message: object) -> None:
    raise TransportError("the NATS server is unreachable")


async def test_a_publisher_that_hangs_delays_no_later_message(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_reporter, "PUBLISH_TIMEOUT_S", 0.01)
    engine = FakeEngine()
    worker, received = await serve(engine)
    topic = worker.reporter._kv_topic  # type: ignore[union-attr]

    async def hangs(message: object) -> None:
        await asyncio.sleep(1000)

    worker.reporter._kv_topic = SimpleNamespace(publish=hangs)  # type: ignore[union-attr]
    engine.store(0, 1)
    await until(lambda: worker.reporter._ranks[0].sequence == 1)  # type: ignore[union-attr]
    worker.reporter._kv_topic = topic  # type: ignore[union-attr]
    engine.store(1000, 1)
    await until(lambda: received.kv)
    assert not worker.reporter._ranks[0].unsent  # type: ignore[union-attr]


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
async def test_kv_events_follow_the_settings(serve: Serve, settings: Any, listens: bool) -> None:
    engine = FakeEngine()
    _, received = await serve(engine, **settings)
    assert (engine.listener is not None) is listens
    await until(lambda: received.load)
    assert received.load[0].kv_events is listens


async def test_without_a_prefix_cache_one_warning_is_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    _, received = await serve(FakeEngine(emits_kv_events=False), **{"enable-prefix-caching": False})
    await until(lambda: received.load)
    assert not received.load[0].kv_events
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "enable-prefix-caching is false" in record.getMessage()


# -- load


def request(request_id: str, prompt: int = 10, **more: Any) -> GenerateRequest:
    return GenerateRequest([1] * prompt, Sampling(), request_id, **more)


async def test_load_follows_a_request_from_start_to_end(serve: Serve) -> None:
    engine = FakeEngine()
    worker, received = await serve(engine)
    engine.store(0, 2)
    await until(lambda: received.load and received.kv)
    stream = worker.generate(request("a", 10, expected_hit=4))
    await until(lambda: received.load[-1].accepted == ["a"])
    assert received.load[-1] == WorkerLoad(WORKER, 0, 1, 0, 2, 3, 500, 0.25, 100, 50, ["a"], 1, SIZE, True)
    channel = engine.running[0][1]
    before = len(received.load)
    channel.push(Delta("x", [1], prompt_tokens=10, cached_tokens=0))
    await until(lambda: len(received.load) > before)
    assert (received.load[-1].prefill_blocks, received.load[-1].decode_blocks, received.load[-1].accepted) == (0, 3, [])
    channel.push(Delta("xyz", [1, 2, 3]))
    assert worker.reporter is not None
    assert worker.reporter.load(0).decode_blocks == 4  # 14 tokens
    channel.end()
    await until(lambda: received.load[-1].decode_blocks == 0)
    assert [delta.text async for delta in stream] == ["x", "xyz"]


@pytest.mark.parametrize("end", ["cancel", "drop", "error"])
async def test_load_drops_however_a_request_ends(serve: Serve, end: str) -> None:
    engine = FakeEngine()
    worker, received = await serve(engine)
    stream: Stream[Delta] | None = worker.generate(request("a"))
    assert stream is not None
    await until(lambda: received.load and received.load[-1].prefill_blocks == 3)
    if end == "cancel":
        stream.cancel()
    elif end == "error":
        engine.running[0][1].end(EngineError("broken"))
        with pytest.raises(EngineError, match="broken"):
            await anext(stream)
    stream = None
    await until(lambda: (received.load[-1].prefill_blocks, received.load[-1].decode_blocks) == (0, 0))
    assert engine.cancelled == (end != "error")


async def test_load_is_published_every_second_and_not_per_request(serve: Serve) -> None:
    engine = FakeEngine()
    worker, received = await serve(engine)
    began = time.monotonic()
    streams = [worker.generate(request(f"r{number}")) for number in range(500)]
    await until(lambda: sum(len(load.accepted) for load in received.load) == 500)
    assert len(received.load) <= 3 + (time.monotonic() - began) / worker_reporter.LOAD_INTERVAL_S
    for stream in streams:
        stream.cancel()
    await until(lambda: received.load[-1].decode_blocks == 0)
    quiet = len(received.load)
    await until(lambda: len(received.load) > quiet)
    assert time.monotonic() - began > 0.9


async def test_a_request_goes_to_its_rank_or_the_least_loaded_one(serve: Serve) -> None:
    engine = FakeEngine(ranks=2)
    worker, received = await serve(engine)
    streams = [worker.generate(request("a", rank=1)), worker.generate(request("b")), worker.generate(request("c"))]
    assert [asked.rank for asked, _ in engine.running] == [1, 0, 0]
    await until(lambda: sum(len(load.accepted) for load in received.load) == 3)
    assert {load.rank: load.accepted for load in received.load if load.accepted} == {1: ["a"], 0: ["b", "c"]}
    assert received.load[-1].waiting == received.load[-1].rank  # its own statistics
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

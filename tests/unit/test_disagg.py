"""Disaggregated prefill: when it is used, and the decode worker's fallback if prefill workers refuse, die or are silent."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.worker import VllmWorker
from dynamo import codec
from dynamo.errors import ConfigError, EngineError, OverloadedError, TransportError, WorkerLostError
from dynamo.kv_router.events import BlocksStored
from dynamo.llm.cached_blocks import CachedBlocks
from dynamo.llm.disagg import PrefillOffer, PrefillRequest, PrefillTask, local_prefill_reason
from dynamo.llm.disagg_metrics import DecodeMetrics
from dynamo.llm.engine import EngineInfo
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.llm.remote_prefill import RemotePrefill
from dynamo.sdk import Service, Stream, bind, depends, is_linked, service
from dynamo.sdk.depends import Choice, StartCall, Stub
from dynamo.sdk.endpoint import EndpointSpec
from dynamo.sdk.graph import build
from dynamo.sdk.links import EDGES
from dynamo.sdk.spec import spec_of
from dynamo.streams import Channel, Reply

COUNTS = st.integers(0, 5000)


@dataclasses.dataclass
class Settings:
    """A decode worker's settings; see `PrefillSettings`."""

    remote_prefill: bool
    conditional_disagg: bool
    max_local_prefill_length: int
    max_prefill_queue_size: int
    prefill_timeout_s: float = 10.0


SETTINGS = st.builds(Settings, st.booleans(), st.booleans(), COUNTS, st.integers(0, 10))
ALWAYS = Settings(True, False, 10, 3)
CONDITIONAL = Settings(True, True, 10, 3)


@given(SETTINGS, COUNTS, st.integers(0, 10))
def test_remote_if_enabled_and_unconditional_or_long_with_a_short_queue(
    settings: Settings, new: int, waiting: int
) -> None:
    remote = settings.remote_prefill and (
        not settings.conditional_disagg
        or (new > settings.max_local_prefill_length and waiting < settings.max_prefill_queue_size)
    )
    assert (local_prefill_reason(settings, new, waiting) is None) == remote


@given(SETTINGS, COUNTS, st.integers(0, 10), st.integers(0, 100))
def test_a_longer_queue_or_a_shorter_prompt_never_makes_a_prompt_remote(
    settings: Settings, new: int, waiting: int, more: int
) -> None:
    if local_prefill_reason(settings, new + more, waiting) is not None:
        assert local_prefill_reason(settings, new, waiting + more) is not None


class Pool:
    """Two prefill workers and their queue: the transport behind a real stub, with the client under test.

    Each task is handled by the next of `behaviour`, and then by an offer of worker 7.
    """

    def __init__(
        self, *behaviour: Callable[[PrefillTask], Any], settings: Settings = ALWAYS, hit_tokens: int | None = None
    ) -> None:
        self.behaviour = list(behaviour)
        self.settings = dataclasses.replace(settings)
        self.alive = [7, 8]
        self.tasks: list[PrefillTask] = []
        self.requests: list[PrefillRequest] = []
        self.declined: list[str] = []
        self.queue = 0
        self.lost = False
        self.answer: Callable[[PrefillRequest], Awaitable[dict[str, Any]]] = self.compute
        self.generated: list[GenerateRequest] = []
        self.registry = CollectorRegistry()
        transport: Any = self
        workers: Any = Stub(spec_of(PrefillWorker), transport)
        self.client = RemotePrefill(
            self.generate,
            workers=workers,
            queue=self,
            settings=self.settings,
            cached_blocks=cached_prompt(hit_tokens),
            offers_subject="offers",
            metrics=DecodeMetrics(self.registry),
        )

    # -- the stub's transport

    def instance_ids(self) -> list[int]:
        return self.alive

    def in_flight(self) -> dict[int, int]:
        return {}

    def endpoint(self, spec: EndpointSpec) -> StartCall:
        return partial(self.start, spec)

    def start(self, endpoint: EndpointSpec, request: Any, choice: Choice, avoid: frozenset[int]) -> Stream[Any]:
        assert choice == 7
        return Reply.opening(self.run_endpoint(endpoint.name, request))

    async def run_endpoint(self, name: str, request: Any) -> Stream[Any]:
        channel: Channel[Any] = Channel()
        channel.push(await getattr(self, name)(request))
        channel.end()
        return Stream(channel)

    # -- the queue

    async def put(self, task: PrefillTask) -> None:
        self.tasks.append(task)
        self.behaviour.pop(0)(task) if self.behaviour else self.offer(task)

    async def waiting(self) -> int:
        if self.lost:
            raise TransportError("NATS is unreachable")
        return self.queue

    # -- the workers

    def offer(self, task: PrefillTask) -> None:
        asyncio.get_running_loop().call_soon(self.client.on_offer, codec.encode(PrefillOffer(task.id, 7)))

    async def compute(self, request: PrefillRequest) -> dict[str, Any]:
        return {"at": request.task}

    async def prefill(self, request: PrefillRequest) -> dict[str, Any]:
        self.requests.append(request)
        return await self.answer(request)

    async def decline(self, task: str) -> None:
        self.declined.append(task)

    # -- the decode worker

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        self.generated.append(request)
        channel: Channel[Delta] = Channel()
        channel.push(Delta("x", [1]))
        channel.end()
        return Stream(channel)

    async def run(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request as the decode worker's engine receives it."""
        async with asyncio.timeout(10):
            assert [delta.text async for delta in self.client.generate(request)] == ["x"]
        assert len(self.generated) == 1
        return self.generated[0]

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"dynamo_disagg_{name}", labels) or 0.0


def cached_prompt(hit_tokens: int | None) -> CachedBlocks:
    """The blocks of an engine that has the first `hit_tokens` of the prompt 0, 1, 2, … cached; None: no KV events."""
    blocks = CachedBlocks()
    if hit_tokens is not None:
        blocks.reported = True
        blocks.open(EngineInfo(1000, 10, 100))
        stored = BlocksStored(list(range(hit_tokens // 10)), None, list(range(hit_tokens)), 10)
        blocks.ranks[0].apply([stored])
    return blocks


def ask(length: int = 100, **more: Any) -> GenerateRequest:
    return GenerateRequest(list(range(length)), Sampling(), "r", **more)


def nothing(_: PrefillTask) -> None:
    return None


async def test_a_prompt_is_computed_by_the_worker_that_offers() -> None:
    pool = Pool()
    request = await pool.run(ask(expected_hit=32, rank=1))
    assert request.kv_transfer == {"at": pool.tasks[0].id}
    assert request.expected_hit == 100
    sent = pool.requests[0].request
    assert (sent.token_ids, sent.expected_hit, sent.rank) == (list(range(100)), 0, None)
    assert pool.counted("remote_prefills_total") == 1
    assert pool.counted("remote_prefill_tokens_total") == 100
    assert pool.counted("transfer_seconds_count") == 1


@pytest.mark.parametrize(
    ("change", "request_", "reason"),
    [
        ({"settings": CONDITIONAL}, ask(10), "short"),
        ({"settings": CONDITIONAL, "hit_tokens": 90}, ask(), "short"),
        ({"settings": CONDITIONAL, "queue": 3}, ask(), "queue"),
        ({"alive": []}, ask(), "no-worker"),
        ({}, GenerateRequest([1, 2], Sampling(n=2)), "request"),
        ({}, GenerateRequest([1, 2], Sampling(prompt_logprobs=1)), "request"),
    ],
)
async def test_prompts_computed_locally_and_why(change: dict[str, Any], request_: GenerateRequest, reason: str) -> None:
    options = {name: change.pop(name) for name in ("settings", "hit_tokens") if name in change}
    pool = Pool(**options)
    vars(pool).update(change)
    found = await pool.run(request_)
    assert (found.kv_transfer, found.expected_hit) == (None, 0)
    assert pool.counted("local_prefills_total", reason=reason) == 1
    assert not pool.tasks


async def test_disabled_or_already_computed_is_not_counted() -> None:
    disabled = dataclasses.replace(ALWAYS, remote_prefill=False)
    for settings, request in ((disabled, ask()), (ALWAYS, ask(kv_transfer={"a": 1}))):
        pool = Pool(settings=settings)
        assert (await pool.run(request)).kv_transfer == request.kv_transfer
        assert not pool.tasks
        assert pool.counted("failures_total") == 0


def refuse(error: Exception) -> Callable[[PrefillTask], None]:
    def behave(_: PrefillTask) -> None:
        raise error

    return behave


async def test_a_lost_queue_ends_the_wait() -> None:
    pool = Pool(nothing)
    running = asyncio.create_task(pool.run(ask()))
    while not pool.tasks:
        await asyncio.sleep(0)
    pool.lost = True  # with the task in it
    async with asyncio.timeout(5):
        assert (await running).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="failed") == 1


@pytest.mark.parametrize("error", [OverloadedError("full"), TransportError("NATS is unreachable")])
async def test_a_queue_that_refuses_tasks_costs_no_request(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(refuse(error))
    assert (await pool.run(ask())).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="failed") == pool.counted("failures_total") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_repeated_failures_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(*[refuse(TransportError("away"))] * 5)
    for _ in range(5):
        pool.generated.clear()
        await pool.run(ask())
    assert pool.counted("failures_total") == 5
    assert len(caplog.records) == 1


async def test_a_prompt_is_retried_on_another_worker_when_the_first_dies() -> None:
    pool = Pool()

    async def die_once(request: PrefillRequest) -> dict[str, Any]:
        if len(pool.requests) == 1:
            raise WorkerLostError("lost")
        return await pool.compute(request)

    pool.answer = die_once
    assert (await pool.run(ask())).kv_transfer == {"at": pool.tasks[1].id}
    assert pool.tasks[0].id != pool.tasks[1].id
    assert pool.counted("failures_total") == 0


@pytest.mark.parametrize(("error", "tries"), [(WorkerLostError("lost"), 3), (EngineError("broken"), 1)])
async def test_after_the_last_try_the_prompt_is_computed_here(error: Exception, tries: int) -> None:
    pool = Pool()

    async def fail(_: PrefillRequest) -> dict[str, Any]:
        raise error

    pool.answer = fail
    found = await pool.run(ask(expected_hit=32))
    assert (found.kv_transfer, found.expected_hit, len(pool.requests)) == (None, 32, tries)


async def test_the_wait_ends_when_no_prefill_worker_is_left() -> None:
    pool = Pool(lambda _: pool.alive.clear())
    assert (await pool.run(ask())).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="failed") == 1


async def test_a_late_offer_is_declined() -> None:
    pool = Pool(nothing)
    pool.settings.prefill_timeout_s = 0.01
    assert (await pool.run(ask())).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="timeout") == 1
    pool.offer(pool.tasks[0])
    async with asyncio.timeout(10):
        while not pool.declined:
            await asyncio.sleep(0.001)
    assert pool.declined == [pool.tasks[0].id]
    assert not pool.requests


@pytest.mark.parametrize("offered", [False, True])
async def test_cancelling_stops_the_computation_or_declines_the_offer(offered: bool) -> None:
    pool = Pool() if offered else Pool(nothing)
    stopped = asyncio.Event()

    async def compute(_: PrefillRequest) -> dict[str, Any]:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()
        return {}

    pool.answer = compute
    stream = pool.client.generate(ask())
    async with asyncio.timeout(10):
        while not (pool.requests if offered else pool.tasks):
            await asyncio.sleep(0.001)
        stream.cancel()
        if offered:
            await stopped.wait()
        else:
            await asyncio.sleep(0)
            pool.offer(pool.tasks[0])
            while not pool.declined:
                await asyncio.sleep(0.001)
    assert not pool.generated


async def test_own_waiting_prompts_count_before_the_queue_reports_them() -> None:
    pool = Pool(*[nothing] * 9, settings=CONDITIONAL)
    waiting = [pool.client.generate(ask()) for _ in range(3)]
    async with asyncio.timeout(10):
        while len(pool.tasks) < 3:
            await asyncio.sleep(0.001)
    assert (await pool.run(ask())).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="queue") == 1
    for stream in waiting:
        stream.cancel()


def test_an_invalid_offer_is_dropped() -> None:
    Pool().client.on_offer(b"\xc1")


# -- the graph


def test_prefill_workers_exist_only_in_graphs_that_link_them() -> None:
    assert "PrefillWorker" not in build("x", VllmWorker, []).services
    assert "PrefillWorker" not in build("x", Processor, []).services
    import graphs.disagg

    edges = [edge for edge in EDGES if edge.graph == "graphs.disagg"]
    found = build("graphs.disagg:Frontend", graphs.disagg.Frontend, edges)
    assert list(found.services) == ["PrefillWorker", "VllmWorker", "Processor", "Frontend"]


def test_an_optional_dependency_may_be_missing() -> None:
    @service
    class Backend(Service): ...

    @service
    class Front(Service):
        backend = depends(Backend, optional=True)

    front = Front()
    assert not is_linked(front, "backend")
    bind(front, backend=Backend())
    assert is_linked(front, "backend")


def test_remote_prefill_needs_prefill_workers() -> None:
    with pytest.raises(ConfigError, match="needs a PrefillWorker"):
        VllmWorker(model="dynamo-tiny", engine="mock", remote_prefill=True)
    worker = VllmWorker(model="dynamo-tiny", engine="mock")
    with pytest.raises(ConfigError, match="needs a PrefillWorker"):
        worker.remote_prefill = True


async def test_a_prefill_worker_as_plain_python() -> None:
    """Without a graph, as in a user's unit test."""
    worker = PrefillWorker(model="dynamo-tiny", engine="mock", speedup_ratio=0)
    await worker.start()
    await worker.tasks.put(PrefillTask("a", 3, "nowhere"))
    assert await worker.tasks.waiting() == 1
    found = await worker.engine.prefill(ask(3))
    assert found["name"]
    await worker.stop()

"""Prefill by another worker: when, and what the decode worker does if those it asks refuse, die, or say nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
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
from dynamo.llm.disagg import PrefillOffer, PrefillRequest, PrefillTask, Rules, local_reason
from dynamo.llm.disagg_metrics import DecodeMetrics
from dynamo.llm.protocol import Delta, GenerateRequest, Sampling
from dynamo.llm.remote_prefill import RemotePrefill
from dynamo.sdk import Service, Stream, bind, depends, is_linked, service
from dynamo.sdk.graph import build
from dynamo.sdk.links import EDGES
from dynamo.streams import Channel

COUNTS = st.integers(0, 5000)
RULES = st.builds(Rules, st.booleans(), st.booleans(), COUNTS, st.integers(0, 10))
ALWAYS = Rules(True, False, 10, 3)
CONDITIONAL = Rules(True, True, 10, 3)


@given(RULES, COUNTS, st.integers(0, 10))
def test_remote_if_wanted_and_either_always_or_long_while_few_wait(rules: Rules, new: int, waiting: int) -> None:
    remote = rules.remote_prefill and (
        not rules.conditional_disagg
        or (new > rules.max_local_prefill_length and waiting < rules.max_prefill_queue_size)
    )
    assert (local_reason(rules, new, waiting) is None) == remote


@given(RULES, COUNTS, st.integers(0, 10), st.integers(0, 100))
def test_a_longer_queue_and_a_shorter_prompt_never_make_it_remote(
    rules: Rules, new: int, waiting: int, more: int
) -> None:
    if local_reason(rules, new + more, waiting) is not None:
        assert local_reason(rules, new, waiting + more) is not None


class Pool:
    """Prefill workers and their queue, which do as `behave` says with each task and worker in turn."""

    def __init__(self, *behaviour: Callable[[PrefillTask], Any], rules: Rules = ALWAYS, hit: int = 0) -> None:
        self.behaviour, self.rules = list(behaviour), rules
        self.alive = [7, 8]
        self.tasks: list[PrefillTask] = []
        self.asked: list[PrefillRequest] = []
        self.declined: list[str] = []
        self.queue, self.lost = 0, False
        self.timeout_s = 10.0
        self.answer: Callable[[PrefillRequest], Awaitable[dict[str, Any]]] = self.compute
        self.generated: list[GenerateRequest] = []
        self.registry = CollectorRegistry()
        self.decode = RemotePrefill(
            self.generate,
            tasks=self,
            workers=lambda: self.alive,
            at=lambda _: self,
            hit=lambda _: hit,
            rules=lambda: self.rules,
            timeout_s=lambda: self.timeout_s,
            reply="offers",
            metrics=DecodeMetrics(self.registry),
        )

    async def put(self, task: PrefillTask) -> None:
        self.tasks.append(task)
        self.behaviour.pop(0)(task) if self.behaviour else self.offer(task)

    async def waiting(self) -> int:
        if self.lost:
            raise TransportError("NATS is away")
        return self.queue

    def offer(self, task: PrefillTask) -> None:
        asyncio.get_running_loop().call_soon(self.decode.take_offer, codec.encode(PrefillOffer(task.id, 7)))

    async def compute(self, request: PrefillRequest) -> dict[str, Any]:
        return {"at": request.task}

    async def prefill(self, request: PrefillRequest) -> dict[str, Any]:
        self.asked.append(request)
        return await self.answer(request)

    async def decline(self, task: str) -> None:
        self.declined.append(task)

    def generate(self, request: GenerateRequest) -> Stream[Delta]:
        self.generated.append(request)
        channel: Channel[Delta] = Channel()
        channel.push(Delta("x", [1]))
        channel.end()
        return Stream(channel)

    async def run(self, request: GenerateRequest) -> GenerateRequest:
        """What the engine gets."""
        async with asyncio.timeout(10):
            assert [delta.text async for delta in self.decode.generate(request)] == ["x"]
        assert len(self.generated) == 1
        return self.generated[0]

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"dynamo_disagg_{name}", labels) or 0.0


def ask(length: int = 100, **more: Any) -> GenerateRequest:
    return GenerateRequest(list(range(length)), Sampling(), "r", **more)


def nothing(_: PrefillTask) -> None:
    return None


async def test_a_prompt_is_computed_by_whoever_offers() -> None:
    pool = Pool()
    request = await pool.run(ask(expected_hit=32, rank=1))
    assert request.kv_transfer == {"at": pool.tasks[0].id}
    assert request.expected_hit == 100
    sent = pool.asked[0].request
    assert (sent.token_ids, sent.expected_hit, sent.rank) == (list(range(100)), 0, None)
    assert pool.counted("remote_prefills_total") == 1
    assert pool.counted("remote_prefill_tokens_total") == 100
    assert pool.counted("transfer_seconds_count") == 1


@pytest.mark.parametrize(
    ("change", "request_", "reason"),
    [
        ({"rules": CONDITIONAL}, ask(10), "short"),
        ({"rules": CONDITIONAL, "hit": 90}, ask(), "short"),
        ({"rules": CONDITIONAL, "queue": 3}, ask(), "queue"),
        ({"alive": []}, ask(), "no-worker"),
        ({}, GenerateRequest([1, 2], Sampling(n=2)), "request"),
        ({}, GenerateRequest([1, 2], Sampling(prompt_logprobs=1)), "request"),
    ],
)
async def test_why_prompts_stay(change: dict[str, Any], request_: GenerateRequest, reason: str) -> None:
    options = {name: change.pop(name) for name in ("rules", "hit") if name in change}
    pool = Pool(**options)
    vars(pool).update(change)
    found = await pool.run(request_)
    assert (found.kv_transfer, found.expected_hit) == (None, 0)
    assert pool.counted("local_prefills_total", reason=reason) == 1
    assert not pool.tasks


async def test_off_or_already_computed_is_nobodys_business() -> None:
    for rules, request in ((ALWAYS._replace(remote_prefill=False), ask()), (ALWAYS, ask(kv_transfer={"a": 1}))):
        pool = Pool(rules=rules)
        assert (await pool.run(request)).kv_transfer == request.kv_transfer
        assert not pool.tasks
        assert pool.counted("failures_total") == 0


def refuse(error: Exception) -> Callable[[PrefillTask], None]:
    def behave(_: PrefillTask) -> None:
        raise error

    return behave


async def test_nobody_waits_for_a_queue_that_is_lost() -> None:
    pool = Pool(nothing)
    running = asyncio.create_task(pool.run(ask()))
    while not pool.tasks:
        await asyncio.sleep(0)
    pool.lost = True  # with the task in it
    async with asyncio.timeout(5):
        assert (await running).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="failed") == 1


@pytest.mark.parametrize("error", [OverloadedError("full"), TransportError("NATS is away")])
async def test_a_queue_that_takes_nothing_costs_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(refuse(error))
    assert (await pool.run(ask())).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="failed") == pool.counted("failures_total") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_failures_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(*[refuse(TransportError("away"))] * 5)
    for _ in range(5):
        pool.generated.clear()
        await pool.run(ask())
    assert pool.counted("failures_total") == 5
    assert len(caplog.records) == 1


async def test_another_worker_gets_it_when_the_first_dies() -> None:
    pool = Pool()

    async def die_once(request: PrefillRequest) -> dict[str, Any]:
        if len(pool.asked) == 1:
            raise WorkerLostError("gone")
        return await pool.compute(request)

    pool.answer = die_once
    assert (await pool.run(ask())).kv_transfer == {"at": pool.tasks[1].id}
    assert pool.tasks[0].id != pool.tasks[1].id
    assert pool.counted("failures_total") == 0


@pytest.mark.parametrize(("error", "tries"), [(WorkerLostError("gone"), 3), (EngineError("broken"), 1)])
async def test_in_the_end_it_is_computed_here(error: Exception, tries: int) -> None:
    pool = Pool()

    async def fail(_: PrefillRequest) -> dict[str, Any]:
        raise error

    pool.answer = fail
    found = await pool.run(ask(expected_hit=32))
    assert (found.kv_transfer, found.expected_hit, len(pool.asked)) == (None, 32, tries)


async def test_nobody_left_to_wait_for() -> None:
    pool = Pool(lambda _: pool.alive.clear())
    assert (await pool.run(ask())).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="failed") == 1


async def test_a_late_offer_is_declined() -> None:
    pool = Pool(nothing)
    pool.timeout_s = 0.01
    assert (await pool.run(ask())).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="timeout") == 1
    pool.offer(pool.tasks[0])
    async with asyncio.timeout(10):
        while not pool.declined:
            await asyncio.sleep(0.001)
    assert pool.declined == [pool.tasks[0].id]
    assert not pool.asked


@pytest.mark.parametrize("offered", [False, True])
async def test_cancelling_stops_whoever_computes_or_is_about_to(offered: bool) -> None:
    pool = Pool() if offered else Pool(nothing)
    stopped = asyncio.Event()

    async def compute(_: PrefillRequest) -> dict[str, Any]:
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()
        return {}

    pool.answer = compute
    stream = pool.decode.generate(ask())
    async with asyncio.timeout(10):
        while not (pool.asked if offered else pool.tasks):
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


async def test_only_so_many_wait_even_before_the_queue_knows() -> None:
    pool = Pool(*[nothing] * 9, rules=CONDITIONAL)
    waiting = [pool.decode.generate(ask()) for _ in range(3)]
    async with asyncio.timeout(10):
        while len(pool.tasks) < 3:
            await asyncio.sleep(0.001)
    assert (await pool.run(ask())).kv_transfer is None
    assert pool.counted("local_prefills_total", reason="queue") == 1
    for stream in waiting:
        stream.cancel()


def test_rubbish_on_the_subject_is_dropped() -> None:
    Pool().decode.take_offer(b"\xc1")


# -- the graph


def test_prefill_workers_are_there_only_where_a_graph_links_them() -> None:
    assert "PrefillWorker" not in build("x", VllmWorker, []).services
    assert "PrefillWorker" not in build("x", Processor, []).services
    import graphs.disagg

    edges = [edge for edge in EDGES if edge.graph == "graphs.disagg"]
    found = build("graphs.disagg:Frontend", graphs.disagg.Frontend, edges)
    assert list(found.services) == ["PrefillWorker", "VllmWorker", "Processor", "Frontend"]


def test_a_service_may_do_without_an_optional_one() -> None:
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


async def test_a_prefill_worker_by_itself() -> None:
    """As in a test of one's own, without a graph."""
    worker = PrefillWorker(model="dynamo-tiny", engine="mock", speedup_ratio=0)
    await worker.start()
    await worker.tasks.put(PrefillTask("a", 3, "nowhere"))
    assert await worker.tasks.waiting() == 1
    found = await worker.engine.prefill(ask(3))
    assert found["name"]
    await worker.stop()

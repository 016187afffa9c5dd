"""graphs.disagg with mock workers: while workers are killed, drained or full, answers stay right and no KV block is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from itertools import count

import httpx
import pytest

from dynamo.engines.mock import MockEngine
from dynamo.llm.protocol import GenerateRequest, Sampling
from tests.cli.terminal import command
from tests.graph.test_agg_router import metrics
from tests.served import Served, Start, until

LONG, TOKENS = 3000, 12
_NEW = count(1)


def prompt(length: int = LONG) -> list[int]:
    """Return a prompt that shares no prefix with any other."""
    number = next(_NEW)
    return [100 + number % 400, 100 + number // 400, *(100 + i % 700 for i in range(length - 2))]


def expected(prompts: list[list[int]]) -> list[str]:
    """Return the answers of a mock engine without a graph."""

    async def work() -> list[str]:
        engine = MockEngine("dynamo-tiny", {"speedup-ratio": 0, "max-model-len": 32768}, lambda _: None)
        await engine.start()

        async def text(tokens: list[int]) -> str:
            request = GenerateRequest(tokens, Sampling(max_tokens=TOKENS, temperature=0))
            return "".join([delta.text async for delta in engine.generate(request)])

        answers = [await text(tokens) for tokens in prompts]
        await engine.stop()
        return answers

    return asyncio.run(work())


async def ask(served: Served, client: httpx.AsyncClient, tokens: list[int]) -> str:
    body = {"model": "dynamo-tiny", "prompt": tokens, "max_tokens": TOKENS, "temperature": 0}
    answer = await client.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def ask_all(served: Served, prompts: list[list[int]], meanwhile: Callable[[], Awaitable[None]] | None = None) -> None:
    """Send all prompts concurrently; the answers must be right."""

    async def work() -> list[str]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client, asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(served, client, tokens)) for tokens in prompts]
            if meanwhile is not None:
                group.create_task(meanwhile())  # type: ignore[arg-type]
            return list(await asyncio.gather(*asked))

    assert asyncio.run(work()) == expected(prompts)


def total(served: Served, name: str, **labels: str) -> float:
    return sum(value for has, value in metrics(served).get(name, []) if labels.items() <= has.items())


def local(served: Served, reason: str) -> float:
    return total(served, "dynamo_disagg_local_prefills_total", reason=reason)


def remote(served: Served) -> float:
    return total(served, "dynamo_disagg_remote_prefills_total")


def settled(served: Served) -> None:
    """Wait until no worker holds a block or a task; KV that is not fetched is held for 30 s."""

    def idle() -> bool:
        found = metrics(served)
        held = ("llm_kv_blocks_active", "dynamo_prefill_tasks_in_hand", "dynamo_prefill_queue_waiting")
        return sum(value for name in held for _, value in found.get(name, ())) == 0

    until(idle, "all blocks are free and all tasks done", 45)


def live(served: Served, component: str) -> int:
    return sum(has["component"] == component for has, _ in metrics(served)["llm_kv_blocks_total"])


@pytest.fixture(scope="module")
def graph(serve_graph: Start) -> Served:
    return serve_graph(
        "-f", "configs/disagg_mock.yaml", "--VllmWorker.speedup-ratio=10", "--VllmWorker.max-prefill-queue-size=1000",
        graph="graphs.disagg:Frontend",
    ).ready()  # fmt: skip


@pytest.fixture
def served(graph: Served) -> Iterator[Served]:
    """Two workers of each kind, idle again after each test."""
    until(lambda: live(graph, "VllmWorker") == live(graph, "PrefillWorker") == 2, "two workers of each kind")
    ask_all(graph, [prompt() for _ in range(4)])  # so that all connections are open
    yield graph
    settled(graph)


def test_long_prompts_are_computed_by_prefill_workers_and_short_ones_are_not(served: Served) -> None:
    before = remote(served), local(served, "short"), total(served, "dynamo_prefill_tokens_total")
    ask_all(served, [prompt() for _ in range(6)] + [prompt(150) for _ in range(5)])
    assert remote(served) - before[0] == 6
    assert local(served, "short") - before[1] == 5
    assert total(served, "dynamo_prefill_tokens_total") - before[2] == 6 * LONG
    assert total(served, "dynamo_disagg_transfer_seconds_count") == remote(served)


def test_prompts_cached_by_the_decode_worker_are_not_long(served: Served) -> None:
    tokens = prompt()
    ask_all(served, [tokens])
    ask_all(served, [tokens])  # the other worker
    before = remote(served), local(served, "short")
    ask_all(served, [[*tokens, 5, number] for number in range(4)])
    assert (remote(served) - before[0], local(served, "short") - before[1]) == (0, 4)


def test_prefill_workers_serve_no_model(served: Served) -> None:
    table = command("status", **served.servers).stdout
    models = [line for line in table.splitlines() if line.startswith("dynamo-tiny")]
    assert len(models) == 1
    assert "VllmWorker" in models[0]
    assert "dynamo.PrefillWorker" in table


def test_a_killed_prefill_worker_costs_no_answer(served: Served) -> None:
    seen = len(served.output)

    async def kill() -> None:
        await asyncio.to_thread(until, lambda: total(served, "dynamo_prefill_tasks_in_hand") >= 5, "tasks in hand")
        os.kill(served.pids("--service-name PrefillWorker --worker-id 1")[0], signal.SIGKILL)

    before = remote(served)
    ask_all(served, [prompt() for _ in range(40)], kill)
    assert remote(served) - before == 40
    served.wait_for("PrefillWorker:1 ready again", 20, after=seen)


def test_without_any_prefill_worker_prompts_are_computed_here_until_one_is_back(served: Served) -> None:
    seen = len(served.output)

    async def kill() -> None:
        await asyncio.to_thread(until, lambda: total(served, "dynamo_prefill_tasks_in_hand") >= 5, "tasks in hand")
        for pid in served.pids("--service-name PrefillWorker"):
            os.kill(pid, signal.SIGKILL)

    before = local(served, "no-worker") + local(served, "failed")
    ask_all(served, [prompt() for _ in range(40)], kill)
    assert local(served, "no-worker") + local(served, "failed") > before
    for number in (1, 2):
        served.wait_for(f"PrefillWorker:{number} ready again", 20, after=seen)
    before = remote(served)
    until(lambda: ask_all(served, [prompt()]) is None and remote(served) > before, "a prefill worker is asked again")


def test_a_drained_decode_worker_finishes_its_requests(served: Served) -> None:
    seen = len(served.output)

    async def drain() -> None:
        await asyncio.sleep(0.1)
        os.kill(served.pids("--service-name VllmWorker --worker-id 1")[0], signal.SIGTERM)

    ask_all(served, [prompt() for _ in range(20)], drain)
    served.wait_for("VllmWorker:1 ready again", 20, after=seen)


def test_a_drained_prefill_worker_finishes_its_prompts(served: Served) -> None:
    seen = len(served.output)

    async def drain() -> None:
        await asyncio.to_thread(until, lambda: total(served, "dynamo_prefill_tasks_in_hand") >= 5, "tasks in hand")
        os.kill(served.pids("--service-name PrefillWorker --worker-id 2")[0], signal.SIGTERM)

    failed = total(served, "dynamo_disagg_failures_total")
    ask_all(served, [prompt() for _ in range(40)], drain)
    assert total(served, "dynamo_disagg_failures_total") == failed
    served.wait_for("PrefillWorker:2 ready again", 20, after=seen)


def test_a_killed_decode_worker_leaves_nothing_in_the_prefill_workers(served: Served) -> None:
    seen = len(served.output)

    async def work() -> None:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client:
            asked = [asyncio.create_task(ask(served, client, prompt())) for _ in range(20)]
            await asyncio.sleep(0.2)
            os.kill(served.pids("--service-name VllmWorker --worker-id 2")[0], signal.SIGKILL)
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(work())
    served.wait_for("VllmWorker:2 ready again", 20, after=seen)


def test_disconnected_clients_leave_nothing_behind(served: Served) -> None:
    async def work() -> None:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client:
            asked = [asyncio.create_task(ask(served, client, prompt())) for _ in range(40)]
            for number, task in enumerate(asked):
                await asyncio.sleep(0.01 + number % 5 * 0.005)
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(work())


def test_settings_change_while_the_graph_runs(served: Served) -> None:
    env = served.servers

    def set_to(setting: str, value: str) -> None:
        done = command("set", f"VllmWorker.{setting}={value}", **env)
        assert done.returncode == 0, done.stdout

    try:
        set_to("remote-prefill", "false")
        before = remote(served)
        ask_all(served, [prompt() for _ in range(4)])
        assert remote(served) == before
        assert command("set", "--unset", "VllmWorker.remote-prefill", **env).returncode == 0
        set_to("max-local-prefill-length", str(LONG))
        ask_all(served, [prompt(), prompt(LONG + 1)])
        assert remote(served) == before + 1
        set_to("max-prefill-queue-size", "0")
        queue = local(served, "queue")
        ask_all(served, [prompt(LONG + 1)])
        assert (remote(served), local(served, "queue")) == (before + 1, queue + 1)
        set_to("conditional-disagg", "false")
        ask_all(served, [prompt(10)])
        assert remote(served) == before + 2
    finally:
        for name in ("remote-prefill", "max-local-prefill-length", "max-prefill-queue-size", "conditional-disagg"):
            command("set", "--unset", f"VllmWorker.{name}", **env)


def test_a_full_queue_and_a_slow_pool_delay_no_request(served: Served) -> None:
    env = served.servers
    try:
        assert command("set", "VllmWorker.max-prefill-queue-size=2", **env).returncode == 0
        before = local(served, "queue"), remote(served)
        for _ in range(5):  # a busy machine sends them so slowly that the pool keeps up
            ask_all(served, [prompt() for _ in range(60)])
            if local(served, "queue") > before[0]:
                break
        assert local(served, "queue") > before[0]
        assert remote(served) > before[1]
        assert command("set", "VllmWorker.prefill-timeout-s=0.01", **env).returncode == 0
        late = local(served, "timeout")
        ask_all(served, [prompt() for _ in range(4)])
        assert local(served, "timeout") == late + 4
    finally:
        for name in ("max-prefill-queue-size", "prefill-timeout-s"):
            command("set", "--unset", f"VllmWorker.{name}", **env)


def test_with_the_router_a_prefix_is_computed_once(serve_graph: Start) -> None:
    served = serve_graph(
        "-f", "configs/disagg_router_mock.yaml", "--VllmWorker.speedup-ratio=10", graph="graphs.disagg_router:Frontend"
    ).ready()  # fmt: skip
    tokens = prompt()
    ask_all(served, [tokens])
    assert remote(served) == 1
    until(lambda: total(served, "dynamo_router_index_blocks") >= LONG // 16, "the router knows the blocks fetched")
    ask_all(served, [[*tokens, 7, number] for number in range(6)])
    assert remote(served) == 1
    assert total(served, "dynamo_prefill_tokens_total") == LONG
    settled(served)

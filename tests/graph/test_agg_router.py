"""graphs.agg_router with mock workers: requests go to their prefix, and the index survives killed processes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from itertools import count

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from components.worker import VllmWorker
from dynamo import codec
from dynamo.kv_router.events import KvSnapshot, SnapshotRequest
from dynamo.rpc.runtime import Runtime
from tests.cli.terminal import command
from tests.served import Served, Start

MOCK = ("-f", "configs/agg_router_mock.yaml", "--VllmWorker.ServiceArgs.workers=3", "--VllmWorker.speedup-ratio=20")
BLOCK = 16
_NEW = count(100)


def prompt(topic: int, blocks: int = 8) -> list[int]:
    """Return a prompt that begins like no other topic's."""
    return [100 + topic % 400, *(100 + (topic // 400 + i) % 700 for i in range(1, blocks * BLOCK + 4))]


class Answer:
    def __init__(self, body: dict[str, object]) -> None:
        usage: dict[str, dict[str, int]] = body["usage"]  # type: ignore[assignment]
        self.text: str = body["choices"][0]["text"]  # type: ignore[index]
        self.cached = usage["prompt_tokens_details"]["cached_tokens"]


async def ask(served: Served, client: httpx.AsyncClient, tokens: list[int], **nvext: object) -> Answer:
    body = {"model": "dynamo-tiny", "prompt": tokens, "max_tokens": 4, "temperature": 0, "nvext": nvext}
    answer = await client.post(f"{served.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return Answer(answer.json())


def complete(served: Served, tokens: list[int], **nvext: object) -> Answer:
    async def once() -> Answer:
        async with httpx.AsyncClient() as client:
            return await ask(served, client, tokens, **nvext)

    return asyncio.run(once())


def metrics(served: Served) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def held(served: Served, workers: int = 3) -> dict[str, int]:
    """Return the number of blocks in each worker's cache, as the workers report it."""
    env = served.servers
    runtime = Runtime(nats_url=env["NATS_SERVER"], etcd_endpoints=env["ETCD_ENDPOINTS"])
    try:
        client = await runtime.client(*VllmWorker.dynamo_address(), "kv_snapshot")
        found = {}
        for worker in await client.wait_for_instances(workers, 10):
            parts = client.call(SnapshotRequest(), worker, decode=codec.decoder(KvSnapshot), streaming=True)
            found[f"{worker:x}"] = sum([len(part.hashes) // 8 async for part in parts])
        return found
    finally:
        await runtime.close()


def known(served: Served) -> dict[str, int]:
    """Return the same, as the Router reports it."""
    return {labels["worker"]: int(n) for labels, n in metrics(served).get("dynamo_router_worker_cached_blocks", [])}


def agree(served: Served, workers: int = 3, timeout_s: float = 10) -> dict[str, int]:
    """Wait until both report the same: events take some milliseconds."""
    deadline = time.monotonic() + timeout_s
    while (reported := known(served)) != (holds := asyncio.run(held(served, workers))):
        assert time.monotonic() < deadline, f"the Router knows {reported}, the workers hold {holds}"
        time.sleep(0.1)
    return reported


@pytest.fixture(scope="module")
def served(serve_graph: Start) -> Served:
    return serve_graph(*MOCK, graph="graphs.agg_router:Frontend").ready()


@pytest.mark.parametrize("mode", ["kv", "approx-kv"])
def test_a_prompt_goes_to_the_worker_with_its_prefix(served: Served, mode: str) -> None:
    tokens = prompt(next(_NEW))
    assert complete(served, tokens, router=mode).cached == 0
    agree(served)
    for _ in range(5):
        assert complete(served, [*tokens[: 6 * BLOCK], 7, 8, 9], router=mode).cached == 6 * BLOCK


@pytest.mark.parametrize("mode", ["round-robin", "random", "power-of-two", "least-loaded", "kv-load"])
def test_other_modes_answer_too(served: Served, mode: str) -> None:
    texts = {complete(served, prompt(1), router=mode).text for _ in range(4)}
    assert len(texts) == 1


def test_bad_routing_in_a_request_is_an_error_of_the_request(served: Served) -> None:
    body = {"model": "dynamo-tiny", "prompt": "x", "nvext": {"router": "fastest"}}
    answer = httpx.post(f"{served.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "nvext.router")


def test_a_request_may_name_its_worker(served: Served) -> None:
    worker = sorted(agree(served))[0]
    tokens = prompt(next(_NEW))
    complete(served, tokens, backend_instance_id=worker)
    assert complete(served, tokens, backend_instance_id=worker).cached == 8 * BLOCK
    body = {"model": "dynamo-tiny", "prompt": tokens, "nvext": {"backend_instance_id": "abc"}}
    answer = httpx.post(f"{served.url}/v1/completions", json=body)
    assert answer.status_code == 503
    assert "instance abc of dynamo/VllmWorker/generate is not available" in answer.text


def test_metrics_and_status_show_the_routing(served: Served) -> None:
    tokens = prompt(next(_NEW))
    before = metrics(served)
    complete(served, tokens)
    agree(served)
    complete(served, tokens)
    after = metrics(served)

    def grown(name: str) -> float:
        return sum(n for _, n in after[name]) - sum(n for _, n in before.get(name, []))

    assert grown("dynamo_router_decision_seconds_count") == 2
    assert grown("dynamo_router_prompt_blocks_total") == 16
    assert grown("dynamo_router_overlap_blocks_sum") == 8
    assert grown("llm_prefix_cache_hits_total") == 8 * BLOCK
    assert [labels["mode"] for labels, _ in after["dynamo_router_requests_total"]].count("kv") >= 1
    table = command("status", **served.servers).stdout
    assert re.search(r"ENDPOINT.* KV +HITS", table), table


def test_the_mode_changes_while_it_runs(served: Served) -> None:
    env = served.servers
    tokens = prompt(next(_NEW))
    assert command("set", "Processor.router=round-robin", **env).returncode == 0
    assert [complete(served, tokens).cached for _ in range(6)] == [0, 0, 0, *[8 * BLOCK] * 3]
    assert command("set", "--unset", "Processor.router", **env).returncode == 0
    assert complete(served, [*tokens, 1, 2]).cached == 8 * BLOCK


def test_a_killed_router_delays_no_request_and_rebuilds_its_index(served: Served) -> None:
    tokens = [prompt(next(_NEW)) for _ in range(6)]
    for one in tokens:
        complete(served, one)
    agree(served)
    seen = len(served.output)
    os.kill(served.pids("--service-name Router")[0], signal.SIGKILL)
    for one in tokens:  # while it restarts
        assert complete(served, prompt(next(_NEW))).text
        assert complete(served, one).text
    served.wait_for("Router ready again", 20, after=seen)
    agree(served)
    time.sleep(0.2)  # until the Processor has found it
    assert [complete(served, one).cached for one in tokens] == [8 * BLOCK] * 6


def test_a_killed_worker_is_forgotten_and_the_others_answer(served: Served) -> None:
    for _ in range(6):
        complete(served, prompt(next(_NEW)))
    before = agree(served)
    seen = len(served.output)
    os.kill(served.pids("--service-name VllmWorker --worker-id 2")[0], signal.SIGKILL)
    for _ in range(10):
        assert complete(served, prompt(next(_NEW))).text
    served.wait_for("VllmWorker:2 ready again", 20, after=seen)
    after = agree(served)
    assert len(after.keys() - before.keys()) == 1


def test_under_load_with_evictions_and_faults_the_index_stays_right(serve_graph: Start) -> None:
    """Use small caches, two Routers, and prompts that evict each other; kill a Router and a worker meanwhile."""
    served = serve_graph(
        *MOCK, "--VllmWorker.num-gpu-blocks-override=120", "--Router.ServiceArgs.workers=2",
        graph="graphs.agg_router:Frontend",
    ).ready()  # fmt: skip

    async def load() -> int:
        failed = 0
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=24)) as client:
            for round in range(12):
                if round == 4:
                    os.kill(served.pids("--service-name Router --worker-id 1")[0], signal.SIGKILL)
                if round == 8:
                    os.kill(served.pids("--service-name VllmWorker --worker-id 1")[0], signal.SIGKILL)
                answers = await asyncio.gather(
                    *(ask(served, client, [*prompt(1000 + i % 17, 12), round]) for i in range(24)),
                    return_exceptions=True,
                )
                failed += sum(isinstance(answer, BaseException) for answer in answers)
        return failed

    assert asyncio.run(load()) == 0
    served.wait_for("VllmWorker:1 ready again", 20)
    # two lines for each worker, one from each Router, which must be equal
    deadline = time.monotonic() + 10
    while True:
        reported = metrics(served)["dynamo_router_worker_cached_blocks"]
        holds = asyncio.run(held(served))
        if sorted((labels["worker"], int(n)) for labels, n in reported) == sorted([*holds.items()] * 2):
            break
        assert time.monotonic() < deadline, f"the Routers know {reported}, the workers hold {holds}"
        time.sleep(0.1)
    assert served.stop() == 0


def test_without_events_routing_history_is_used_and_logged_once(serve_graph: Start) -> None:
    served = serve_graph(*MOCK, "--VllmWorker.kv-events=false", graph="graphs.agg_router:Frontend").ready()
    tokens = prompt(next(_NEW))
    complete(served, tokens)
    assert [complete(served, tokens).cached for _ in range(4)] == [8 * BLOCK] * 4
    time.sleep(1.2)  # until each worker has reported its load
    blind = metrics(served)["dynamo_router_worker_blind"]
    assert [value for _, value in blind] == [1, 1, 1]
    lines = [line for line in served.output.splitlines() if "approx-kv" in line]
    assert len(lines) == 1, lines
    assert served.stop() == 0


def test_a_custom_score_decides(serve_graph: Start) -> None:
    served = serve_graph(
        *MOCK, "--Router.custom-router=tests.graph.first_worker:score", graph="graphs.agg_router:Frontend"
    ).ready()
    for _ in range(5):
        complete(served, prompt(next(_NEW)))
    used = {labels["worker"] for labels, _ in metrics(served)["dynamo_router_requests_total"]}
    assert used == {min(agree(served), key=lambda worker: int(worker, 16))}
    assert served.stop() == 0

"""A graph with a Planner: workers are added under load and removed after it, and no request fails meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import httpx
import pytest

from tests.cli.terminal import command, environment
from tests.served import Served, Start, until

GRAPH = "tests.graph.planned:Frontend"
CONFIG = {
    "Common": {"model": "dynamo-tiny", "block-size": 16, "max-model-len": 8192, "engine": "mock"},
    "VllmWorker": {
        "remote-prefill": True,
        "num-gpu-blocks-override": 400,
        "mock-slow-factor": 3,
        "ServiceArgs": {"workers": 1, "resources": {"gpu": 1}},
    },
    "PrefillWorker": {
        "max-prefills": 1,
        "mock-slow-factor": 12,
        "ServiceArgs": {"workers": 1, "resources": {"gpu": 1}},
    },
    "Planner": {  # thresholds between which no load of this test lies, so that it grows, stays and shrinks
        "adjustment-interval": 2,
        "metric-pulling-interval": 0.2,
        "max-gpu-budget": 4,
        "decode-kv-scale-up-threshold": 0.2,
        "decode-kv-scale-down-threshold": 0.01,
        "prefill-queue-scale-up-threshold": 2,
    },
}
CLIENTS, PROMPT_TOKENS, TOKENS = 24, 400, 20
_NEW = count(1)


class Load(threading.Thread):
    """Clients that send one request after the other until `stop`."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._url = f"{served.url}/v1/completions"
        self._stopping = threading.Event()
        self.answers = 0
        self.failures: list[str] = []

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=CLIENTS)) as client:
            await asyncio.gather(*(self._client(client) for _ in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        while not self._stopping.is_set():
            number = next(_NEW)
            prompt = [100 + number % 400, 100 + number // 400, *(100 + i % 700 for i in range(PROMPT_TOKENS - 2))]
            body = {"model": "dynamo-tiny", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
            answer = await client.post(self._url, json=body)
            if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != TOKENS:
                self.failures.append(answer.text)
            self.answers += 1

    def stop(self) -> None:
        self._stopping.set()
        self.join(120)


@pytest.fixture
def load() -> Iterator[list[Load]]:
    """The loads that a test starts, stopped when it ends."""
    started: list[Load] = []
    yield started
    for one in started:
        one.stop()


def start(serve_graph: Start, gpus: str, *arguments: str) -> Served:
    env = environment(DYN_DEPLOYMENT_CONFIG=json.dumps(CONFIG), CUDA_VISIBLE_DEVICES=gpus)
    return serve_graph(*arguments, graph=GRAPH, env=env).ready()


def scaled(served: Served, *arguments: str) -> str:
    """Return what `dynamo scale` prints."""
    result = command("scale", *arguments, "--pid", str(pid_of(served)), **served.servers)
    assert result.returncode == 0, result.stderr
    return result.stdout


def graphs(served: Served) -> list[dict[str, Any]]:
    result = command("status", "--json", **served.servers)
    found: list[dict[str, Any]] = json.loads(result.stdout)["deployments"][0]["graphs"]
    return found


def pid_of(served: Served) -> int:
    """Return the pid of the supervisor, as `dynamo status` shows it."""
    return int(graphs(served)[0]["pid"])


def workers(served: Served) -> dict[str, dict[str, str]]:
    """Return the workers by name, as `dynamo scale` lists them."""
    found = {}
    for line in scaled(served).splitlines()[2:]:
        name, state, *rest = line.split()[1:]
        gpus = rest.pop(0) if len(rest) == 3 else ""
        found[name] = {"state": state, "gpus": gpus, "pid": rest[0]}
    return found


def test_workers_follow_the_load(serve_graph: Start, load: list[Load]) -> None:
    served = start(serve_graph, "4,5,6,7")
    load.append(clients := Load(served))
    clients.start()
    served.wait_for("PrefillWorker:2 added", 60)
    served.wait_for("VllmWorker:2 added", 60)
    found = workers(served)
    assert sorted(worker["gpus"] for name, worker in found.items() if "Worker" in name) == ["4", "5", "6", "7"]
    until(lambda: requests(served) >= 4, "all four workers have served requests")
    # the budget, 4 GPUs, is used up
    served.wait_for("added: 4 of 4 GPUs in use", 30)
    # a worker that was added is restarted like the others
    os.kill(int(found["VllmWorker:2"]["pid"]), signal.SIGKILL)
    served.wait_for(re.compile(r"VllmWorker:2 died \(SIGKILL\); restarting"), 20)
    served.wait_for(re.compile(r"VllmWorker:2 ready again"), 30)
    clients.stop()
    assert clients.failures == []
    assert clients.answers > CLIENTS
    served.wait_for("PrefillWorker:2 removed in", 60)
    served.wait_for("VllmWorker:2 removed in", 60)
    found = workers(served)
    assert sorted(name for name in found if "Worker" in name) == ["PrefillWorker", "VllmWorker"]
    served.wait_for("1 prefill and 1 decode workers, 2 of 4 GPUs: no change", 30, after=len(served.output))
    assert served.stop(signal.SIGINT) == 0


def requests(served: Served) -> int:
    """Return how many workers have served a request."""
    result = command("status", "--json", **served.servers)
    instances = json.loads(result.stdout)["deployments"][0]["instances"]
    busy = [i for i in instances if i["endpoint"] in ("generate", "prefill") and i["requests"]]
    return len(busy)


def test_no_operation_changes_nothing(serve_graph: Start, load: list[Load]) -> None:
    served = start(serve_graph, "0,1,2", "--Planner.no-operation=true", "--VllmWorker.ServiceArgs.workers=2")
    served.wait_for("no operation: prefill queue 0.00 a worker, KV usage 0.00, 1 prefill and 2 decode workers", 30)
    assert "-1 decode worker (KV 0.00 < 0.01)" in served.output
    refused = command("scale", "VllmWorker=+1", **served.servers)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: no GPU for one more VllmWorker: it needs 1 GPU, 0 of 3 are free\nhint: ")
    served.wait_for("no operation:", 30, after=len(served.output))
    assert {name for name in workers(served) if "Vllm" in name} == {"VllmWorker:1", "VllmWorker:2"}
    assert "removing" not in served.output
    # by hand, under load: the streams of the worker that is removed finish
    load.append(clients := Load(served))
    clients.start()
    until(lambda: requests(served) == 3, "all workers have served requests")
    assert scaled(served, "VllmWorker=1") == "VllmWorker: 2 -> 1 worker\n"
    assert scaled(served, "VllmWorker=2") == "VllmWorker: 1 -> 2 workers\n"
    clients.stop()
    assert clients.failures == []


def test_kubernetes_is_a_notice(serve_graph: Start) -> None:
    served = start(serve_graph, "0,1", "--Planner.environment=kubernetes")
    served.wait_for("environment: kubernetes is not supported yet: decisions are logged, and nothing is changed", 20)
    served.wait_for("no operation: prefill queue 0.00", 30)

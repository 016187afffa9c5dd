"""The shipped graphs in memory: the real components and the mock engine, from HTTP to tokens, without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.processor import Processor
from components.worker import VllmWorker
from dynamo.llm.protocol import CompletionRequest, Sampling
from dynamo.sdk.links import EDGES
from dynamo.sdk.testing import TestGraph

GRAPHS = ("agg", "agg_router", "disagg", "disagg_router")
PROMPT = "Once upon a time there was a prompt that is longer than a KV block of sixteen tokens. " * 4


def config(graph: str, **worker: Any) -> dict[str, dict[str, Any]]:
    """Return settings for two workers of a shipped graph on the mock engine, unpaced."""
    mode = "kv" if "router" in graph else "round-robin"
    found: dict[str, dict[str, Any]] = {
        "Common": {"model": "dynamo-tiny", "block-size": 16},
        "Processor": {"router": mode},
        "VllmWorker": {"engine": "mock", "speedup-ratio": 0, "router": mode, "ServiceArgs": {"workers": 2}, **worker},
    }
    if graph.startswith("disagg"):
        found["VllmWorker"] |= {"remote-prefill": True, "conditional-disagg": True, "max-local-prefill-length": 64}
        found["PrefillWorker"] = {"engine": "mock", "speedup-ratio": 0}
    if mode == "kv":
        found["Router"] = {"min-workers": 2}
    return found


def chat(**body: Any) -> dict[str, Any]:
    return {"model": "dynamo-tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, **body}


@pytest.mark.parametrize("name", GRAPHS)
async def test_a_chat_from_http_to_tokens(name: str) -> None:
    async with TestGraph(f"graphs.{name}:Frontend", config(name)) as graph, graph.http() as http:
        whole = (await http.post("/v1/chat/completions", json=chat())).json()
        assert whole["usage"]["completion_tokens"] == 8
        streamed = await http.post("/v1/chat/completions", json=chat(stream=True))
        events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
        assert events[-1] == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
        assert "".join(deltas) == whole["choices"][0]["message"]["content"]
        assert (await http.get("/health")).json()["models"] == ["dynamo-tiny"]
        refused = await http.post("/v1/chat/completions", json=chat(model="gpt-x"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


OWN_NAMESPACE = """
from components.frontend import Frontend
from components.processor import Processor
from components.worker import VllmWorker
from dynamo.sdk import service

@service(dynamo={"namespace": "mine"})
class Worker(VllmWorker): ...

Frontend.link(Processor).link(Worker)
"""


@pytest.fixture
def forget_links() -> Iterator[None]:
    """Keep this process's other graphs without links from finding those of a test."""
    before = len(EDGES)
    yield
    del EDGES[before:]


@pytest.mark.usefixtures("forget_links")
async def test_a_worker_in_a_namespace_of_its_own_is_the_graphs(tmp_path: Path) -> None:
    """So the Processor answers for its model, under the name that the Frontend gives it."""
    (tmp_path / "own_namespace.py").write_text(OWN_NAMESPACE)
    settings = {
        "Frontend": {"served_model_name": "alias"},
        "Processor": {"model": "dynamo-tiny"},
        "Worker": {"model": "dynamo-tiny", "engine": "mock", "speedup-ratio": 0},
    }
    async with TestGraph(f"{tmp_path}/own_namespace.py:Frontend", settings) as graph, graph.http() as http:
        assert (await http.get("/health")).json()["models"] == ["alias"]
        assert (await http.post("/v1/chat/completions", json=chat(model="alias"))).status_code == 200


async def test_the_router_sends_a_prompt_to_the_worker_that_has_it() -> None:
    async with TestGraph("graphs.agg_router:Frontend", config("agg_router")) as graph, graph.http() as http:
        cached = []
        while sum(count > 0 for count in cached) < 2:  # the Router learns of the first request's blocks by an event
            assert len(cached) < 20
            usage = (await http.post("/v1/chat/completions", json=chat())).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0
        assert cached[-1] == cached[-2] > 16


async def test_long_prompts_are_computed_by_the_prefill_worker() -> None:
    async with TestGraph("graphs.disagg:Frontend", config("disagg")) as graph, graph.http() as http:
        prefill = graph.instances(graph.graph.service("PrefillWorker"))[0]
        await http.post("/v1/chat/completions", json=chat())
        assert prefill.done == 1
        await http.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": "Hi"}]))
        assert prefill.done == 1


@pytest.mark.parametrize("name", ["agg", "agg_router"])
async def test_a_request_survives_its_worker(name: str) -> None:
    request = CompletionRequest("dynamo-tiny", PROMPT, Sampling(max_tokens=40, ignore_eos=True))
    async with TestGraph(f"graphs.{name}:Frontend", config(name, **{"speedup-ratio": 20})) as graph:
        processor = graph.client(Processor)
        expected = [token async for delta in processor.completion(request) for token in delta.token_ids]
        assert len(expected) == 40
        got: list[int] = []
        async for delta in processor.completion(request):
            got += delta.token_ids
            if len(got) == len(delta.token_ids):  # the first one: lose the worker that sent it
                busy = [
                    n for n, worker in enumerate(graph.instances(VllmWorker), 1) if worker.engine.stats()[0].running
                ]
                await graph.kill(VllmWorker, busy[0])
        assert got == expected
        assert len(graph.instances(VllmWorker)) == 1

"""LLM-like graphs of the era: engine flags, routed calls, interfaces, the disaggregated skeleton."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.served import Served, Start


@pytest.fixture(scope="module")
def llm(era: Start) -> Served:
    return era("llm_02").ready()


def test_as_args_gives_argparse_what_the_era_gave_it(llm: Served) -> None:
    found = httpx.post(f"{llm.url}/settings").json()
    assert found == {
        "router": "random",
        "model": "tiny",
        "block_size": 128,
        "max_model_len": 16384,
        "enforce_eager": True,
        "kv_transfer_config": {"kv_connector": "None"},
        "enable_prefix_caching": False,
    }


def test_router_and_direct_calls(llm: Served) -> None:
    """The Router names a worker by its lease; the Processor calls that one."""

    def chat(tokens: list[int]) -> set[str]:
        answers = httpx.post(f"{llm.url}/chat", json={"tokens": tokens}).json()
        assert [answer["text"] for answer in answers] == [f"tiny:{token}" for token in tokens]
        return {answer["worker"] for answer in answers}

    one, two = chat([1, 2]), chat([1, 2, 3])
    assert len(one) == len(two) == 1
    assert one != two
    assert chat([5, 6]) == one


def test_interface_is_fulfilled_by_link(era: Start) -> None:
    served = era("interface_trt").ready()
    assert httpx.post(f"{served.url}/generate", json={"text": "hi"}).text == "fast-trt(hi)"
    assert not served.pids("--service-name VllmWorker")
    served.stop()


def test_unlinked_interface_says_what_to_link(era: Start) -> None:
    served = era("interface_03")
    assert served.process.wait(20) == 1
    assert "Service RouterInterface is not servable. Please use link to override" in served.output
    assert "hint: add Frontend.link(<a service that is a RouterInterface>)" in served.output


def test_disaggregated_skeleton(era: Start) -> None:
    served = era("disagg_03").ready()

    def generate(prompt: str) -> list[dict[str, str]]:
        answer = httpx.post(f"{served.url}/generate", json={"prompt": prompt})
        return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]

    end = {"where": "end", "kv": ""}
    for _ in range(3):  # more than one decode worker: each gets its own KV back
        assert generate("a long prompt") == [{"where": "remote", "kv": "A LONG PROMPT"}, end]
    assert generate("short") == [{"where": "local", "kv": "SHORT"}, end]
    assert [len(served.pids(f"--service-name {name}")) for name in ("DecodeWorker", "PrefillWorker", "Planner")] == [
        2, 1, 0
    ]  # fmt: skip
    served.stop()


CHAIN = """
from components.frontend import Frontend
from components.kv_router import Router
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.worker import VllmWorker

Frontend.link(Processor).link(Router).link(VllmWorker).link(PrefillWorker)
"""


@pytest.mark.parametrize("mode", ["kv", "round-robin"])
def test_one_chain_of_links_serves_with_the_router_and_without(serve_graph: Start, tmp_path: Path, mode: str) -> None:
    """The Processor of the era called its workers by their address; a graph's links never named them as its dependency."""
    (tmp_path / "chain.py").write_text(CHAIN)
    sizes = (
        "--VllmWorker.ServiceArgs.workers=2",
        "--PrefillWorker.ServiceArgs.workers=1",
        f"--Processor.router={mode}",
    )
    arguments = ("--working-dir", str(tmp_path), "-f", "configs/disagg_router_mock.yaml", *sizes)
    served = serve_graph(*arguments, graph="chain:Frontend").ready()
    body = {"model": "dynamo-tiny", "prompt": list(range(100, 164)), "max_tokens": 4}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
    served.stop()

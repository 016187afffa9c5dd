"""LLM-like graphs of the era: engine flags, routed calls, interfaces, the disaggregated skeleton."""

from __future__ import annotations

import json

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

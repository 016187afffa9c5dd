"""KV from one vLLM engine to another, on the CPU with dynamo-tiny, whose answers depend on all of its context.

Four engines: one without transfer, whose answers are the expected ones, two that prefill (one of them with a short
lease; it is killed in the middle) and one that decodes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from dynamo.engines.kv_transfer import configuration
from dynamo.engines.kv_transfer.session import SECRET
from dynamo.engines.vllm.engine import VllmEngine
from dynamo.errors import EngineError, StartError
from dynamo.llm.protocol import GenerateRequest, Sampling
from tests.vllm.engine_process import EngineFailureError, EngineProcess, Engines
from tests.vllm.fork_server import ForkServer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

BLOCK = 32
BLOCKS = 129  # vLLM reserves one of them
ARGUMENTS = {
    "block-size": BLOCK,
    "max-model-len": 4096,
    "max-num-batched-tokens": 512,  # most prompts are computed in several steps
    "num-gpu-blocks-override": BLOCKS,
    "enforce-eager": True,
    "dtype": "float32",
    "kv-cache-memory-bytes": 64 << 20,
}
LEASE_S = 2.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(vllm_process: ForkServer) -> AsyncIterator[dict[str, EngineProcess]]:
    transfers = {
        "model": "dynamo-tiny",
        "arguments": {**ARGUMENTS, "kv-transfer": True},
        "environment": {SECRET: "known to all of them"},
    }
    brief = {**transfers["arguments"], "kv-transfer-lease-s": LEASE_S}  # type: ignore[dict-item]
    configurations = {
        "alone": {"model": "dynamo-tiny", "arguments": ARGUMENTS},
        "prefill": transfers,
        "brief": {**transfers, "arguments": brief},
        "decode": {**transfers, "events": True},
    }
    async with Engines(configurations, vllm_process) as found:
        yield found


DICE = random.Random(11)


def prompt(length: int) -> list[int]:
    return [DICE.randrange(10, 1000) for _ in range(length)]


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


async def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def transferred(engine: EngineProcess, name: str) -> float:
    return float((await engine.state())["transferred"].get(name, 0))


async def free(engine: EngineProcess) -> bool:
    return (await engine.state())["stats"]["kv_usage"] == 0


async def assert_same(engines: dict[str, EngineProcess], tokens: list[int], kv: dict[str, Any] | None) -> None:
    right, found = await engines["alone"].generate(tokens), await engines["decode"].generate(tokens, kv_transfer=kv)
    assert found["tokens"] == right["tokens"]
    assert found["logprobs"] == pytest.approx(right["logprobs"], abs=1e-3)


async def test_fifty_prompts_are_answered_as_by_one_engine(engines: dict[str, EngineProcess]) -> None:
    lengths = [10, 31, 32, 33, 64, 511, 512, 513, 3000, *(DICE.randrange(10, 1500) for _ in range(41))]
    decode = engines["decode"]
    before = await transferred(decode, "bytes")
    for length in lengths:
        tokens = prompt(length)
        await assert_same(engines, tokens, await engines["prefill"].prefill(tokens))
    state = await decode.state()
    block_bytes = (state["transferred"]["bytes"] - before) / sum(map(blocks, lengths))
    assert block_bytes == 2 * 4 * 32 * 512  # keys and values, 4 bytes, 32 tokens; all layers' heads: the model's
    assert state["transferred"]["failures"] == 0
    assert state["stats"]["prefix_hits"] == 0, "transferred blocks must not count as hits of this engine's prefix cache"
    assert await free(engines["prefill"])


async def test_kv_of_another_prompt_gives_another_answer(engines: dict[str, EngineProcess]) -> None:
    """Control: if the decode engine computed every prompt itself, equal answers would prove nothing."""
    ours, other = prompt(400), prompt(400)
    kv, digest = await engines["prefill"].prefill(other), (await engines["brief"].prefill(ours))["digest"]
    wrong = await engines["decode"].generate(ours, kv_transfer={**kv, "digest": digest})
    assert wrong["tokens"] != (await engines["alone"].generate(ours))["tokens"]
    await engines["decode"].ask("reset")


async def test_kv_with_the_digest_of_another_prompt_is_not_used(engines: dict[str, EngineProcess]) -> None:
    ours, other = prompt(300), prompt(300)
    await assert_same(engines, ours, await engines["prefill"].prefill(other))
    await until(lambda: free(engines["prefill"]))  # its lease is released, long before it expires


async def test_blocks_in_the_prefix_cache_are_not_fetched(engines: dict[str, EngineProcess]) -> None:
    decode, stem = engines["decode"], prompt(10 * BLOCK)
    await decode.generate(stem)
    tokens = stem + prompt(100)
    before = await transferred(decode, "bytes")
    await assert_same(engines, tokens, await engines["prefill"].prefill(tokens))
    block_bytes = 2 * 4 * 32 * 512
    assert await transferred(decode, "bytes") - before == (blocks(len(tokens)) - 10) * block_bytes


async def test_prefix_hits_of_the_prefill_engine_are_reported(engines: dict[str, EngineProcess]) -> None:
    tokens = prompt(200)
    first, second = [await engines["prefill"].prefill(tokens) for _ in range(2)]
    assert (await engines["decode"].generate(tokens, kv_transfer=second))["cached"] == 6 * BLOCK
    assert (await engines["decode"].generate(tokens, kv_transfer=first))["cached"] == 0


async def test_pulled_blocks_are_published_as_kv_events(engines: dict[str, EngineProcess]) -> None:
    tokens = prompt(257)
    before = (await engines["decode"].state())["events"]
    await engines["decode"].generate(tokens, 1, await engines["prefill"].prefill(tokens))

    async def published() -> bool:
        return (await engines["decode"].state())["events"] - before == 8  # type: ignore[no-any-return]

    await until(published)


async def test_concurrent_transfers(engines: dict[str, EngineProcess]) -> None:
    failures = await transferred(engines["decode"], "failures")

    async def both(tokens: list[int]) -> None:
        await assert_same(engines, tokens, await engines["prefill"].prefill(tokens))

    await asyncio.gather(*(both(prompt(DICE.randrange(40, 400))) for _ in range(32)))
    assert await transferred(engines["decode"], "failures") == failures


async def test_aborted_requests_leave_nothing_behind(engines: dict[str, EngineProcess]) -> None:
    prefill, decode = engines["prefill"], engines["decode"]
    for pause_s in (0.0005, 0.001, 0.003, 0.01, 0.03) * 4:
        tokens = prompt(DICE.randrange(200, 2000))
        question = asyncio.create_task(prefill.prefill(tokens))
        if pause_s == 0.003:
            await asyncio.sleep(pause_s)
            question.cancel()
            continue
        answer = asyncio.create_task(decode.generate(tokens, 30, await question))
        await asyncio.sleep(pause_s)
        answer.cancel()
    for engine in (prefill, decode):
        await until(lambda engine=engine: free(engine))  # type: ignore[misc]
        assert (await engine.state())["tasks"] == 0
    tokens = prompt(500)
    await assert_same(engines, tokens, await prefill.prefill(tokens))


async def test_a_lease_ends_while_the_engine_is_idle(engines: dict[str, EngineProcess]) -> None:
    brief, tokens = engines["brief"], prompt(600)
    kv = await brief.prefill(tokens)
    assert not await free(brief)
    await until(lambda: free(brief))
    failures = await transferred(engines["decode"], "failures")
    await assert_same(engines, tokens, kv)
    assert await transferred(engines["decode"], "failures") == failures + 1


async def test_prompts_are_computed_after_the_prefill_engine_was_killed(engines: dict[str, EngineProcess]) -> None:
    brief, prompts = engines["brief"], [prompt(length) for length in (40, 700, 1500)]
    offers = [await brief.prefill(tokens) for tokens in prompts]
    os.kill(brief.pid, signal.SIGKILL)  # its engine core goes with it
    failures = await transferred(engines["decode"], "failures")
    for tokens, kv in zip(prompts, offers, strict=True):
        await assert_same(engines, tokens, kv)
    assert await transferred(engines["decode"], "failures") == failures + 3


@pytest.mark.parametrize("kv", [{"do_remote_prefill": True}, {"do_remote_prefill": True, "tokens": "x"}, {"other": 1}])
async def test_foreign_parameters_are_ignored(engines: dict[str, EngineProcess], kv: dict[str, Any]) -> None:
    await assert_same(engines, prompt(100), kv)


async def test_all_blocks_are_free_at_the_end(engines: dict[str, EngineProcess]) -> None:
    """A prompt that needs every block of the pool can be answered only if none has leaked."""
    for name in ("prefill", "decode"):
        await until(lambda name=name: free(engines[name]))  # type: ignore[misc]
        answer = await engines[name].generate(prompt(4096 - 20), 15)
        assert len(answer["tokens"]) == 15


async def test_prefill_without_kv_transfer_is_an_error(engines: dict[str, EngineProcess]) -> None:
    with pytest.raises(EngineFailureError, match="keeps no KV"):
        await engines["alone"].prefill(prompt(10))
    with pytest.raises(EngineFailureError, match="ContextLengthError"):
        await engines["prefill"].prefill(prompt(5000))
    with pytest.raises(EngineError):
        await VllmEngine("m", {}, print).prefill(GenerateRequest([1], Sampling()))


# -- configuration


async def test_no_configuration_without_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    with pytest.raises(StartError, match=f"{SECRET} is not set"):
        configuration.pull_connector_config(30.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
            {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"},
        ),
        ('{"kv_connector": "X"}', {"kv_connector": "X", "kv_load_failure_policy": "recompute"}),
        ({"kv_load_failure_policy": "fail"}, {"kv_load_failure_policy": "fail"}),
        ("{", "{"),
        ("[1]", "[1]"),
    ],
)
async def test_users_connector_is_kept_with_defaults(given: Any, expected: Any) -> None:
    assert configuration.with_defaults(given) == expected


async def test_nixl_gets_a_free_port() -> None:
    nixl = {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [{"kv_connector": "NixlConnector"}]},
    }
    first, second = (configuration.nixl_environment(nixl, "127.0.0.1") for _ in range(2))
    assert first["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
    assert int(first["VLLM_NIXL_SIDE_CHANNEL_PORT"]) != int(second["VLLM_NIXL_SIDE_CHANNEL_PORT"])
    assert configuration.nixl_environment({"kv_connector": "LMCacheConnectorV1"}, "127.0.0.1") == {}

"""Workers that die or stop in the middle of answers: the clients see nothing of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from typing import NamedTuple

import httpx
import pytest

from tests.served import Served, Start, until

TWO = ("-f", "configs/agg_mock.yaml", "--VllmWorker.ServiceArgs.workers=2")
STREAMS = 32


class Answer(NamedTuple):
    text: str
    finish: list[str]
    usage: dict[str, int]
    errors: list[dict[str, object]]
    done: bool


async def stream(client: httpx.AsyncClient, served: Served, number: int, tokens: int, began: asyncio.Event) -> Answer:
    body = {
        "model": "dynamo-tiny", "prompt": f"Story {number}", "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    answer = Answer("", [], {}, [], False)
    async with client.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                answer = answer._replace(done=True)
            elif data:
                chunk = json.loads(data)
                if "error" in chunk:
                    answer.errors.append(chunk["error"])
                    continue
                answer.usage.update({k: v for k, v in (chunk["usage"] or {}).items() if isinstance(v, int)})
                began.set()
                for choice in chunk["choices"]:
                    answer = answer._replace(text=answer.text + choice["text"])
                    answer.finish.extend([choice["finish_reason"]] if choice["finish_reason"] else [])
    return answer


def streams(
    served: Served, tokens: int, meanwhile: Callable[[], None] | None = None, after_s: float = 0.0
) -> list[Answer]:
    """Return STREAMS concurrent answers; `meanwhile` is called `after_s` after all of them have begun."""

    async def run() -> list[Answer]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=STREAMS)) as client:
            began = [asyncio.Event() for _ in range(STREAMS)]
            asked = [asyncio.create_task(stream(client, served, i, tokens, event)) for i, event in enumerate(began)]
            if meanwhile is not None:
                async with asyncio.timeout(30):
                    await asyncio.gather(*(event.wait() for event in began))
                await asyncio.sleep(after_s)
                meanwhile()
            return await asyncio.gather(*asked)

    return asyncio.run(run())


def migrations(served: Served) -> float:
    found = re.findall(r"^dynamo_migrations_total\{.*\} (\S+)", httpx.get(f"{served.url}/metrics").text, re.MULTILINE)
    return sum(map(float, found))


@pytest.mark.parametrize(
    ("config", "graph"), [("agg_mock", "graphs.agg:Frontend"), ("agg_router_mock", "graphs.agg_router:Frontend")]
)
def test_kill_9_of_one_of_two_workers_changes_no_answer(serve_graph: Start, config: str, graph: str) -> None:
    served = serve_graph("-f", f"configs/{config}.yaml", *TWO[2:], graph=graph).ready()
    expected = streams(served, 150)
    assert all(answer.finish == ["length"] and answer.usage["completion_tokens"] == 150 for answer in expected)
    worker = served.pids("--service-name VllmWorker")[0]
    assert streams(served, 150, lambda: os.kill(worker, signal.SIGKILL)) == expected
    until(lambda: migrations(served) > 0, "the Frontend has the Processor's metrics")  # a busy one may miss a scrape
    assert migrations(served) <= STREAMS
    assert served.stop() == 0


def test_a_stopped_workers_streams_go_on_elsewhere_and_nothing_is_said_twice(
    serve_graph: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_PEER_SILENCE_S", "2")
    served = serve_graph(*TWO).ready()
    expected = streams(served, 600)
    worker = served.pids("--service-name VllmWorker")[0]

    def stop() -> None:
        os.kill(worker, signal.SIGSTOP)

    try:
        assert streams(served, 600, stop, after_s=1) == expected
        assert migrations(served) > 0
        assert "no heartbeat from" in served.output
    finally:
        os.kill(worker, signal.SIGCONT)
    assert streams(served, 600) == expected
    assert served.stop() == 0


def test_without_another_worker_the_stream_goes_on_or_ends_with_an_error(serve_graph: Start) -> None:
    """A worker that is back within a second takes its requests up again; else there is an error, and no false end."""
    served = serve_graph("-f", "configs/agg_mock.yaml").ready()
    expected = streams(served, 150)
    (worker,) = served.pids("--service-name VllmWorker")
    for answer, whole in zip(streams(served, 150, lambda: os.kill(worker, signal.SIGKILL)), expected, strict=True):
        assert whole.text.startswith(answer.text)
        if answer.errors:
            assert (answer.errors[0]["code"], answer.done, answer.finish) == ("worker_lost", False, [])
        else:
            assert answer == whole
    assert served.stop() == 0


def test_the_limit_of_zero_leaves_the_error(serve_graph: Start) -> None:
    served = serve_graph(*TWO, "--Processor.migration-limit=0").ready()
    worker = served.pids("--service-name VllmWorker")[0]
    answers = streams(served, 150, lambda: os.kill(worker, signal.SIGKILL))
    failed = [answer for answer in answers if answer.errors]
    assert len(failed) == STREAMS // 2
    assert {answer.errors[0]["code"] for answer in failed} == {"worker_lost"}
    assert migrations(served) == 0
    assert served.stop() == 0

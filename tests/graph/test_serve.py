"""`dynamo serve` with the mock engine: starting, stopping, what is killed and what is left."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.launcher import guard
from tests.served import Served, Start

MOCK = ("-f", "configs/agg_mock.yaml")


def chat(served: Served, text: str = "hello", **options: object) -> str:
    answer = served.client().chat.completions.create(
        model="dynamo-tiny",
        messages=[{"role": "user", "content": text}],
        temperature=0,
        **{"max_tokens": 12, **options},  # type: ignore[call-overload]
    )
    return str(answer.choices[0].message.content)


def test_the_ready_line_is_followed_by_who_reaches_the_graph(mock_graph: Served) -> None:
    line = f": {mock_graph.url}\nonly this machine reaches it; --host 0.0.0.0 opens it to others\n"
    mock_graph.wait_for(line, 5)


def test_streamed_and_whole_answers_are_the_same(mock_graph: Served) -> None:
    chunks = mock_graph.client().chat.completions.create(
        model="dynamo-tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in chunks:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == chat(mock_graph)
    assert usage is not None
    assert usage.completion_tokens == 12


def test_both_workers_answer_the_same_and_take_turns(mock_graph: Served) -> None:
    assert len({chat(mock_graph) for _ in range(6)}) == 1
    assert len(mock_graph.pids("--service-name VllmWorker")) == 2


def test_health_and_models(mock_graph: Served) -> None:
    assert [m.id for m in mock_graph.client().models.list()] == ["dynamo-tiny"]
    assert httpx.get(f"{mock_graph.url}/health").json()["status"] == "healthy"
    assert httpx.get(f"{mock_graph.url}/live").status_code == 200
    assert "dynamo_frontend_requests_total" in httpx.get(f"{mock_graph.url}/metrics").text


def test_unknown_model_and_too_long_prompt(mock_graph: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        mock_graph.client().chat.completions.create(model="gpt-x", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096") as caught:
        chat(mock_graph, "word " * 9000)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_graph_starts_answers_and_is_stopped_by_a_signal(serve_graph: Start, number: int) -> None:
    served = serve_graph(*MOCK).ready()
    assert chat(served)  # right after "ready", no retries in the client
    for name in ("VllmWorker", "Processor", "Frontend"):
        assert re.search(rf"^{name} ready in [\d.]+ s", served.output, re.MULTILINE), served.output
    assert len(served.processes()) >= 5  # three services, nats-server, etcd
    assert served.stop(number) == 0


SLOW_START = """
import asyncio

from dynamo.sdk import Service, async_on_start, on_shutdown, service


@service
class Slow(Service):
    @async_on_start
    async def start(self):
        print("the hook waits", flush=True)
        await asyncio.Event().wait()

    @on_shutdown
    def stop(self):
        print("the shutdown hook ran", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_cancels_start_hooks(serve_graph: Start, tmp_path: Path, number: int) -> None:
    (tmp_path / "slow.py").write_text(SLOW_START)
    served = serve_graph("--working-dir", str(tmp_path), graph="slow:Slow")
    served.wait_for("the hook waits", 30)
    assert served.stop(number) == 0
    assert "the shutdown hook ran" in served.output


def test_running_streams_finish_on_sigterm(serve_graph: Start) -> None:
    served = serve_graph(*MOCK).ready()
    with served.client().chat.completions.create(
        model="dynamo-tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=150,  # about a second of the mock's time
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
        served.process.send_signal(signal.SIGTERM)
        finish = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
    assert finish == ["length"]
    assert served.process.wait(20) == 0


def test_kill_9_of_serve_leaves_nothing_and_the_next_start_works(serve_graph: Start) -> None:
    served = serve_graph(*MOCK).ready()
    assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    again = serve_graph(*MOCK).ready()
    assert chat(again)
    again.stop()


def test_kill_9_of_the_supervisor_is_reported_by_the_guard(serve_graph: Start) -> None:
    served = serve_graph(*MOCK).ready()
    (supervisor,) = guard.children(served.process.pid)
    assert served.processes()
    os.kill(supervisor, signal.SIGKILL)
    assert served.process.wait(20) == 137
    assert served.processes() == {}
    assert served.output.endswith("error: the supervisor died (SIGKILL); all its processes were ended\n")


@pytest.fixture(scope="module")
def mended_graph(serve_graph: Start) -> Iterator[Served]:
    """A graph whose processes tests kill: it is whole again after each test."""
    served = serve_graph(*MOCK).ready()
    yield served
    served.stop()


@pytest.mark.parametrize("service", ["VllmWorker", "Processor", "Frontend"])
def test_a_killed_service_comes_back(mended_graph: Served, service: str) -> None:
    served = mended_graph
    before = len(served.output)
    (pid,) = served.pids(f"--service-name {service}")
    os.kill(pid, signal.SIGKILL)
    served.wait_for(f"{service} ready again", 20, after=before)
    assert chat(served)


def test_one_of_two_workers_killed_under_load(serve_graph: Start) -> None:
    """New requests never go to the dead one. What it was answering: test_migration.py."""
    served = serve_graph(*MOCK, "--VllmWorker.ServiceArgs.workers=2").ready()
    expected = chat(served)
    os.kill(served.pids("--service-name VllmWorker")[0], signal.SIGKILL)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert chat(served) == expected
    served.stop()


def test_killed_nats_and_etcd_come_back(mended_graph: Served) -> None:
    served = mended_graph
    expected = chat(served)
    for server in ("etcd", "nats"):
        before = len(served.output)
        (pid,) = served.pids(f"/{server}")
        os.kill(pid, signal.SIGKILL)
        served.wait_for(f"{server} died; restarting it", 5, after=before)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            assert chat(served) == expected


def test_services_may_live_in_namespaces_of_their_own(serve_graph: Start, mock_graph: Served) -> None:
    served = serve_graph(*MOCK, "--VllmWorker.ServiceArgs.dynamo.namespace=workers").ready()
    assert chat(served) == chat(mock_graph)
    served.stop()


def test_two_graphs_on_one_machine(serve_graph: Start, mock_graph: Served) -> None:
    served = serve_graph(*MOCK).ready()
    assert chat(served) == chat(mock_graph)
    served.stop()
    assert chat(mock_graph)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--Frontend.endpoint=dynamo.Other.chat"], "Frontend.endpoint: dynamo.Other.chat is not in this graph"),
        (["--Common.model=./no-such-model"], "model directory ./no-such-model does not exist"),
        (["--VllmWorker.ServiceArgs.resources.gpu=64"], "VllmWorker needs 64 GPUs"),
        (["--VllmWorker.engine=mok"], "VllmWorker.engine"),
    ],
)
def test_a_start_that_cannot_work_says_why_and_leaves_nothing(
    serve_graph: Start, arguments: list[str], error: str
) -> None:
    served = serve_graph(*MOCK, *arguments)
    assert served.process.wait(20) == 1
    assert error in served.output
    assert "hint: " in served.output
    assert "Traceback" not in served.output
    if " in /" in served.output:
        assert not served.processes()


def test_a_taken_port_is_known_before_anything_starts(serve_graph: Start, mock_graph: Served) -> None:
    served = serve_graph(*MOCK, f"--Frontend.port={mock_graph.port}")
    assert served.process.wait(20) == 1
    assert served.output.startswith(f"error: cannot listen on 127.0.0.1:{mock_graph.port}")


def test_the_frontend_shows_every_process(mock_graph: Served) -> None:
    model = {"model": "dynamo-tiny", "prompt": "hello", "max_tokens": 2}
    httpx.post(f"{mock_graph.url}/v1/completions", json=model).raise_for_status()
    deadline = time.monotonic() + 10
    while (text := httpx.get(f"{mock_graph.url}/metrics").raise_for_status().text).count("process_open_fds{") < 4:
        assert time.monotonic() < deadline, text  # a busy process may miss the first scrapes
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(types) == len(set(types))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in (
        "process_resident_memory_bytes",
        "process_cpu_seconds",
        "process_open_fds",
        "process_start_time_seconds",
    ):
        found = [sample.labels for sample in families[name].samples]
        assert sorted(labels["service"] for labels in found) == ["Frontend", "Processor", "VllmWorker", "VllmWorker"]
        assert len({labels["worker_id"] for labels in found}) == 4
        assert sorted(labels["worker"] for labels in found) == ["1", "1", "1", "2"]
        assert {labels["namespace"] for labels in found} == {"dynamo"}
    reasons = {sample.labels.get("reason") for sample in families["dynamo_migrations"].samples}
    assert reasons >= {"worker_lost", "engine_dead"}, "a migration would be the first sample: rate() misses that"
    requests = families["dynamo_frontend_requests"].samples
    assert "success" in {sample.labels["status"] for sample in requests}
    assert not any("worker_id" in sample.labels for sample in requests)

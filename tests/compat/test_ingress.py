"""OpenAI servers beside graphs: those that a Frontend of 0.3 starts, and this project's Frontend with others' workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.ports import free_port
from tests.served import ROOT, Served, Start


def chat(url: str, model: str, text: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def wait_for(url: str, *models: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            names = {model["id"] for model in httpx.get(f"{url}/v1/models", timeout=10).json()["data"]}
        except httpx.TransportError:
            names = set()
        if names >= set(models):
            return
        assert time.monotonic() < deadline, names
        time.sleep(0.05)


FRONTENDS = [("Frontend", signal.SIGINT), ("RunFrontend", signal.SIGTERM), ("WaitingFrontend", signal.SIGINT)]


@pytest.mark.parametrize(("frontend", "number"), FRONTENDS)
def test_a_frontend_that_starts_a_server(serve_graph: Start, frontend: str, number: int) -> None:
    served = serve_graph(
        f"--{frontend}.served_model_name=my/speller",
        f"--{frontend}.endpoint=ingress.Processor.chat/completions",
        graph=f"tests.compat.graphs.ingress_03:{frontend}",
        env=os.environ | {"OWN_PORT": str(free_port())},
    )
    served.ready()
    names = ["registered-model"] + (["my/speller"] if frontend != "RunFrontend" else [])
    wait_for(served.url, *names)
    for name in names:
        assert chat(served.url, name, "any") == "ANY"
    assert served.stop(number) == 0  # which sees that nothing is left
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{served.url}/live")


def test_a_frontend_is_restarted_with_the_server_that_it_waits_for(serve_graph: Start) -> None:
    served = serve_graph(
        "--WaitingFrontend.served_model_name=m",
        "--WaitingFrontend.endpoint=ingress.Processor.chat/completions",
        graph="tests.compat.graphs.ingress_03:WaitingFrontend",
        env=os.environ | {"OWN_PORT": str(free_port())},
    )
    served.wait_for("WaitingFrontend ready in", 60)  # the server prints that it is ready, too
    (server,) = served.pids("-p " + str(served.port))
    os.kill(server, signal.SIGKILL)
    served.wait_for("the constructor returned: the server that it waited for has ended; restarting", 60)
    wait_for(served.url, "m")
    assert chat(served.url, "m", "again") == "AGAIN"


def test_a_server_is_restarted_with_its_frontend(serve_graph: Start) -> None:
    served = serve_graph(
        "--Frontend.served_model_name=m",
        "--Frontend.endpoint=ingress.Processor.chat/completions",
        graph="tests.compat.graphs.ingress_03:Frontend",
        env=os.environ | {"OWN_PORT": str(free_port())},
    )
    served.ready()
    wait_for(served.url, "m")
    (frontend,) = served.pids("--service-name Frontend")
    (server,) = served.pids("-p " + str(served.port))
    os.kill(frontend, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while server in served.pids("-p " + str(served.port)) or frontend in served.pids("--service-name Frontend"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wait_for(served.url, "m")
    assert chat(served.url, "m", "again") == "AGAIN"


# -- this project's Frontend


@pytest.fixture(scope="module")
def agg(serve_graph: Start) -> Served:
    return serve_graph("-f", "configs/agg_mock.yaml").ready()


def test_our_frontend_serves_models_of_other_workers(agg: Served, tmp_path: Path) -> None:
    wait_for(agg.url, "dynamo-tiny")
    own = chat(agg.url, "dynamo-tiny", "hi")
    workers = [
        worker(agg, tmp_path / kind, f"dyn://elsewhere.{kind}.generate", "--type", kind, "--name", f"other/{kind}")
        for kind in ("chat", "backend")
    ]
    try:
        wait_for(agg.url, "dynamo-tiny", "other/chat", "other/backend")
        assert chat(agg.url, "other/chat", "hi") == "Any engine will do."
        assert chat(agg.url, "other/backend", "hi") == "Grüße, 世界! stop here please"
        assert chat(agg.url, "dynamo-tiny", "hi") == own
        state = httpx.get(f"{agg.url}/health").json()
        assert state["instances"]["elsewhere.backend.generate"] == 1
    finally:
        for found in workers:
            found.terminate()
            found.wait(30)
    deadline = time.monotonic() + 60
    while "other/chat" in httpx.get(f"{agg.url}/v1/models").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert chat(agg.url, "dynamo-tiny", "hi") == own


def test_http_beside_our_graph(agg: Served, tmp_path: Path) -> None:
    """It finds the graph of this machine, and goes through its Processor."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "output").open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "dynamo.cli.http", "-p", str(port)],
            cwd=ROOT, env=os.environ | agg.servers, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        wait_for(url, "dynamo-tiny")
        assert chat(url, "dynamo-tiny", "hi") == chat(agg.url, "dynamo-tiny", "hi")
        assert "dynamo.Processor.chat/completions" in httpx.get(f"{url}/health").text
    finally:
        server.terminate()
        assert server.wait(30) == 0


def worker(graph: Served, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.compat.graphs.any_worker", *arguments],
            cwd=ROOT, env=os.environ | graph.servers, stdout=output, stderr=output,
        )  # fmt: skip

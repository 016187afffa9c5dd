"""Hello world of both eras: endpoints, `@api`, hooks, configuration, workers, probes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from dynamo.rpc.runtime import Runtime
from tests.served import ROOT, Served, Start

LINE = "Frontend: Middle: Backend: test-mid-back"


@pytest.fixture(scope="module")
def hello_02(era: Start) -> Served:
    return era(
        "hello_02",
        "--Frontend.model=federer",
        "--Middle.bias=0.5",
        "--Middle.ServiceArgs.workers=2",
        "--Backend.ServiceArgs.workers=3",
        "--Backend.ServiceArgs.envs.MARK=7",
    ).ready()


@pytest.fixture(scope="module")
def hello_03(era: Start) -> Served:
    return era("hello_03").ready()


def post(served: Served, path: str, **options: object) -> httpx.Response:
    body = options or {"text": "test"}
    return httpx.post(f"{served.url}/{path}", json=body, timeout=10)


def test_0_2_answers(hello_02: Served) -> None:
    answer = post(hello_02, "generate")
    assert (answer.status_code, answer.text) == (200, LINE)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_command_line_settings_reach_service_config(hello_02: Served) -> None:
    assert post(hello_02, "generate", text="model").text == LINE.replace("test", "federer")
    assert post(hello_02, "whoami", text="x").json()["bias"] == 0.5


def test_processes_by_service_name(hello_02: Served) -> None:
    assert [len(hello_02.pids(f"--service-name {name}")) for name in ("Frontend", "Middle", "Backend")] == [1, 2, 3]


def test_dynamo_context_of_0_2(hello_02: Served) -> None:
    found = post(hello_02, "whoami", text="x").json()
    assert found["lease"] == found["lease_of_endpoint"] > 0
    assert (found["service_name"], found["namespace"]) == ("Backend", "inference")
    assert found["worker_id"] in (1, 2, 3)
    assert b"MARK=7" in Path(f"/proc/{found['pid']}/environ").read_bytes()


def test_bad_bodies_are_422_and_other_methods_405(hello_02: Served, hello_03: Served) -> None:
    for served in (hello_02, hello_03):
        assert post(served, "generate", txt="test").status_code == 422
        assert httpx.get(f"{served.url}/generate").status_code == 405
    assert httpx.get(f"{hello_03.url}/openapi.json").json()["info"]["title"] == "Hello World!"


def test_0_3_answers(hello_03: Served) -> None:
    assert post(hello_03, "generate").text == LINE
    assert httpx.get(f"{hello_03.url}/custom").json() == {"custom": True}
    found = post(hello_03, "length").json()
    assert found == {"length": 4, "order": ["mixin", "own"], "port": hello_03.port}


def test_only_what_is_linked_runs(hello_03: Served) -> None:
    assert not hello_03.pids("--service-name Backend2")


def test_items_that_are_no_text_are_events(hello_03: Served) -> None:
    answer = post(hello_03, "both")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == 'data: {"n":1}\n\ndata: {"n":2}\n\n'


def test_an_exception_is_a_500_with_its_traceback_in_the_log(hello_03: Served) -> None:
    assert post(hello_03, "wrong", text="on purpose").status_code == 500
    hello_03.wait_for("RuntimeError: on purpose", 5)


def test_a_second_http_service_has_a_port_of_its_own(hello_03: Served) -> None:
    hello_03.wait_for("Backend ready", 1)
    line = next(line for line in hello_03.output.splitlines() if line.startswith("Backend ready"))
    url = line.split()[-1].strip("()")
    assert httpx.post(f"{url}/direct_to_backend", json={"text": "x"}).json() == {"backend": "x", "url": url}
    assert 20000 <= int(url.rpartition(":")[2]) < 32768
    assert url != hello_03.url


def test_probes_on_the_services_own_server(hello_03: Served) -> None:
    for path in ("healthz", "readyz"):
        answer = httpx.get(f"{hello_03.url}/{path}")
        assert (answer.status_code, answer.text) == (200, "ok")


def test_shutdown_hooks(era: Start, hello_02: Served, hello_03: Served) -> None:
    """The last of this module: it stops both."""
    for served, line in (
        (hello_02, "Frontend hooks: ['async', 'sync'] shutdown"),
        (hello_03, "Frontend shutdown hook"),
    ):
        assert line not in served.output
        assert served.stop() == 0
        assert served.output.count(line) == 1


def test_workers_of_one_http_service_share_its_port(era: Start) -> None:
    served = era("hello_03", "--Frontend.ServiceArgs.workers=2").ready()
    assert [post(served, "generate").text for _ in range(8)] == [LINE] * 8
    (victim, _) = served.pids("--service-name Frontend")
    before = len(served.output)
    os.kill(victim, signal.SIGKILL)
    served.wait_for("ready again", 20, after=before)
    assert [post(served, "generate").text for _ in range(8)] == [LINE] * 8
    served.stop()


def test_running_answers_finish_on_sigterm(era: Start) -> None:
    served = era("hello_03").ready()
    with httpx.stream("POST", f"{served.url}/slow", json={"text": "a b c d"}) as answer:
        chunks = answer.iter_text()
        text = next(chunks)
        served.process.send_signal(signal.SIGTERM)
        text += "".join(chunks)
    assert text == "a b c d "
    assert served.process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        post(served, "generate")


def test_todays_hello_world(serve_graph: Start) -> None:
    """`graphs.hello_world`: a settings class, pydantic objects as requests, `port` from the file or from --port."""
    served = serve_graph("-f", "configs/hello_world.yaml", graph="graphs.hello_world:Frontend").ready()
    assert post(served, "generate").text == LINE
    assert httpx.get(f"{served.url}/openapi.json").json()["info"]["title"] == "Frontend"
    served.stop()


async def test_a_component_alone(nats_server: str, etcd_server: str) -> None:
    """`python -m components.worker`, as under a debugger, with a file for the whole graph."""
    namespace = f"alone_{os.getpid()}"
    command = [sys.executable, "-m", "components.worker", "-f", "configs/agg_mock.yaml"]
    command += [f"--VllmWorker.ServiceArgs.dynamo.namespace={namespace}"]
    env = {**os.environ, "NATS_SERVER": nats_server, "ETCD_ENDPOINTS": etcd_server}
    runtime = Runtime(nats_url=nats_server, etcd_endpoints=etcd_server)
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=env)
    try:
        client = await runtime.client(namespace, "VllmWorker", "generate")
        assert await client.wait_for_instances(timeout_s=30)
    finally:
        process.send_signal(signal.SIGINT)
        code = await process.wait()
        await runtime.close()
    assert code == 0


def test_a_component_alone_refuses_what_it_does_not_know() -> None:
    command = [sys.executable, "-m", "components.worker", "--VllmWorker.modl=x", "-f", "configs/agg_mock.yaml"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (run.returncode, run.stderr) == (1, "error: --VllmWorker.modl: no such setting\nhint: did you mean model?\n")


def test_system_app_of_a_service_alone(hello_system: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = hello_system
    deadline = time.monotonic() + 15
    while True:
        assert process.poll() is None
        try:
            found = [httpx.get(f"http://127.0.0.1:{port}/{path}").status_code for path in ("healthz", "readyz")]
            if found == [200, 200]:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert httpx.get(f"http://127.0.0.1:{port}/generate").status_code == 404


@pytest.fixture
def hello_system(nats_server: str, etcd_server: str) -> object:
    from tests.ports import free_ports

    port, http_port = free_ports(2)
    env = {
        **os.environ,
        "NATS_SERVER": nats_server,
        "ETCD_ENDPOINTS": etcd_server,
        "DYNAMO_SYSTEM_APP_ENABLED": "true",
        "DYNAMO_SYSTEM_APP_PORT": str(port),
        "DYNAMO_SYSTEM_APP_HOST": "127.0.0.1",
        "DYNAMO_SYSTEM_APP_USE_DEFAULT_HEALTH_CHECKS": "true",
    }
    command = [sys.executable, "-m", "dynamo", "serve", "tests.compat.graphs.hello_03:Frontend"]
    command += ["--service-name", "Backend", f"--Backend.port={http_port}"]
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    yield process, port
    process.terminate()
    assert process.wait(10) == 0

"""A graph on two hosts: joined, cut apart without a word, and back by itself. See `tests.graph.hosts`."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.graph.hosts import INFRA, A, B, Command, Hosts, NotHereError

AGG = ("serve", "graphs.agg_router:Frontend", "-f", "configs/agg_router_mock.yaml")
WORKERS = ("--service-name", "VllmWorker")
STREAMS = 12
LEASE_S = 10


class Answer(NamedTuple):
    text: str
    error: dict[str, Any] | None
    done: bool


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    try:
        found = Hosts(tmp_path_factory.mktemp("hosts"))
    except NotHereError as error:
        pytest.skip(f"this user gets no network namespaces here: {error}")
    yield found
    found.end()


@pytest.fixture(autouse=True)
def mended(hosts: Hosts) -> Iterator[None]:
    yield
    hosts.mend()


@pytest.fixture(scope="module")
def frontend(hosts: Hosts) -> Iterator[Command]:
    """The graph on A, without workers until some join."""
    found = hosts.dynamo(A, *AGG, "--depends", "VllmWorker=elsewhere")
    yield found
    assert found.stop() == 0


@pytest.fixture(scope="module")
def workers(hosts: Hosts, frontend: Command) -> Iterator[Command]:
    """Two on B."""
    found = hosts.dynamo(B, *AGG, *WORKERS, "--VllmWorker.ServiceArgs.workers=2").ready()
    frontend.ready()
    yield found
    assert found.stop() == 0


def client(hosts: Hosts) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(hosts.socket))
    return httpx.AsyncClient(transport=transport, base_url="http://a", timeout=60)


async def stream(hosts: Hosts, number: int, tokens: int, began: asyncio.Event) -> Answer:
    body = {"model": "dynamo-tiny", "prompt": f"Story {number}", "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True}  # fmt: skip
    text, error, done = "", None, False
    async with client(hosts) as http, http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return Answer("", json.loads(await response.aread())["error"], False)
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                done = True
            elif data:
                began.set()
                chunk = json.loads(data)
                error = chunk.get("error") or error
                text += "".join(choice["text"] for choice in chunk.get("choices", ()))
    return Answer(text, error, done)


def streams(hosts: Hosts, tokens: int, meanwhile: Callable[[], None] | None = None) -> list[Answer]:
    """STREAMS answers at a time, and what happens once all of them have begun."""

    async def run() -> list[Answer]:
        began = [asyncio.Event() for _ in range(STREAMS)]
        asked = [asyncio.create_task(stream(hosts, i, tokens, event)) for i, event in enumerate(began)]
        if meanwhile is not None:
            async with asyncio.timeout(30):
                await asyncio.gather(*(event.wait() for event in began))
            meanwhile()
        return await asyncio.gather(*asked)

    return asyncio.run(run())


def get(hosts: Hosts, path: str) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client(hosts) as http:
            return await http.get(path)

    return asyncio.run(once())


def ask(hosts: Hosts, tokens: int = 5) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client(hosts) as http:
            return await http.post(
                "/v1/completions", json={"model": "dynamo-tiny", "prompt": "Hello", "max_tokens": tokens}
            )

    return asyncio.run(once())


def instances(hosts: Hosts) -> dict[str, str]:
    """id -> TCP address of all that generate, as `dynamo status` on A has it."""
    (told,) = json.loads(hosts.ask(A, "status", "--json").splitlines()[-1])["deployments"]
    found = (i for i in told["instances"] if (i["service"], i["endpoint"]) == ("VllmWorker", "generate"))
    return {i["instance"]: i["addresses"]["tcp"] for i in found}


def wait_for_workers(hosts: Hosts, timeout_s: float = 60) -> None:
    """Until both are registered and answer soon: a connection that lost packets takes a while to send them again."""
    deadline = time.monotonic() + timeout_s
    while True:
        found, started = len(instances(hosts)), time.monotonic()
        if found == 2 and all(answer.done for answer in streams(hosts, 5)) and time.monotonic() - started < 2:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


def test_workers_of_another_host_answer(hosts: Hosts, frontend: Command, workers: Command) -> None:
    lines = workers.output.splitlines()
    assert lines[0] == f"joining the graph at nats {A}:4222 (NATS_SERVER), etcd {A}:2379 (ETCD_ENDPOINTS)"
    joined = f"joined dynamo/VllmWorker of the graph at nats://{A}:4222"
    assert re.fullmatch(rf"ready in .* s: {joined}", workers.wait_for("\nready in ") or lines[-1])
    assert {address.partition(":")[0] for address in instances(hosts).values()} == {B}
    answer = ask(hosts)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 5)
    targets = {target for group in get(hosts, "/metrics/targets").json() for target in group["targets"]}
    assert {target.partition(":")[0] for target in targets} == {A, B}


def test_streams_across_a_link_that_is_cut_go_on_at_home(hosts: Hosts, frontend: Command, workers: Command) -> None:
    home = hosts.dynamo(A, *AGG, *WORKERS, "--VllmWorker.ServiceArgs.workers=1").ready()
    try:
        assert len(instances(hosts)) == 3
        whole = streams(hosts, 800)
        assert all(answer.done for answer in whole)
        seen, started = len(frontend.output), time.monotonic()
        assert streams(hosts, 800, hosts.cut) == whole
        assert time.monotonic() - started < 40
        assert "no heartbeat from" in frontend.output[seen:]
        assert "continuing on another worker" in frontend.output[seen:]
    finally:
        assert home.stop() == 0


def test_a_link_that_is_cut_for_longer_than_the_lease_comes_back(
    hosts: Hosts, frontend: Command, workers: Command
) -> None:
    wait_for_workers(hosts)
    before, processes, cut = instances(hosts), hosts.processes(), time.monotonic()
    lost = streams(hosts, 2000, hosts.cut)
    assert all(answer.error and answer.text and not answer.done for answer in lost), lost
    assert {answer.error["code"] for answer in lost if answer.error} <= {"worker_lost", "unavailable"}
    refused = ask(hosts)
    assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
    assert time.monotonic() - cut < 40
    while instances(hosts):
        assert time.monotonic() - cut < 40
        time.sleep(0.5)
    workers.wait_for("lost the NATS server")  # a link without a word is noticed by the clients themselves
    workers.wait_for("etcd does not answer")
    time.sleep(max(cut + 3 * LEASE_S - time.monotonic(), 0))
    hosts.mend()
    wait_for_workers(hosts)
    assert instances(hosts) == before  # the same processes under the same ids
    assert set(processes) <= set(hosts.processes())
    assert all(answer.done for answer in streams(hosts, 50))


def test_carrier_loss_is_no_different(hosts: Hosts, frontend: Command, workers: Command) -> None:
    wait_for_workers(hosts)
    before = instances(hosts)
    hosts.hosts[B].run("ip link set uptob down")
    deadline = time.monotonic() + 40
    while instances(hosts):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    hosts.hosts[B].run("ip link set uptob up", "ip route add default via 10.83.2.1")
    wait_for_workers(hosts)
    assert instances(hosts) == before


def test_a_firewall_is_reported_once_with_the_ports(hosts: Hosts, frontend: Command, workers: Command) -> None:
    wait_for_workers(hosts)
    seen = len(frontend.output)
    hosts.block_ports()
    told = frontend.wait_for("[Processor] dynamo/VllmWorker", 40, after=seen)
    tried = rf"tcp:{re.escape(B)}:\d+ \(no answer in 3 s\)"
    ports = "open its TCP ports 20000-32767 to this host"
    assert re.search(f"on another host, cannot be reached: {tried}; {ports}$", told)
    assert ask(hosts).status_code == 503
    time.sleep(10)
    assert frontend.output[seen:].count("[Processor] dynamo/VllmWorker") == 1
    hosts.mend()
    frontend.wait_for("connected to dynamo/VllmWorker", 40, after=seen)
    wait_for_workers(hosts)


def test_a_loopback_address_is_reported_and_not_called(hosts: Hosts, frontend: Command, workers: Command) -> None:
    seen = len(frontend.output)
    trapped = hosts.dynamo(B, *AGG, *WORKERS, "--VllmWorker.ServiceArgs.workers=1", DYN_HOST_IP="127.0.0.1").ready()
    told = frontend.wait_for("[Processor] dynamo/VllmWorker", after=seen)
    assert re.search(r"on another host, cannot be reached: it advertises 127\.0\.0\.1:\d+, its own loopback; ", told)
    assert "NATS_SERVER to nats://" in told
    assert "DYN_HOST_IP" in told
    assert all(ask(hosts).status_code == 200 for _ in range(6))
    assert trapped.stop() == 0


def test_an_address_that_is_not_of_this_host_is_one_error(hosts: Hosts) -> None:
    for arguments in ((*AGG, *WORKERS), (*AGG, *WORKERS, "--VllmWorker.ServiceArgs.workers=1")):
        failed = hosts.dynamo(B, *arguments, DYN_HOST_IP=A)
        assert failed.process.wait(30) == 1
        errors = [line for line in failed.output.splitlines() if line.startswith(("error:", "hint:"))]
        assert errors[0] == f"error: DYN_HOST_IP={A}: not an address of this host: Cannot assign requested address"
        assert "DYN_BIND_IP=0.0.0.0" in errors[1]
    nat = (*AGG, *WORKERS, "--VllmWorker.ServiceArgs.workers=1")
    translated = hosts.dynamo(B, *nat, DYN_HOST_IP=A, DYN_BIND_IP="0.0.0.0").ready()
    assert A in {address.partition(":")[0] for address in instances(hosts).values()}
    assert translated.stop() == 0


def test_the_same_network_with_other_files_is_reached_over_tcp(
    hosts: Hosts, frontend: Command, workers: Command
) -> None:
    """As systemd's PrivateTmp has it, or a container on the host's network: no socket file in common."""
    script = "from dynamo.transport.network import host_id; print(host_id())"
    apart = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$TMPDIR"; exec "$0" "$@"')
    ids = []
    for before in ((), apart):
        found = hosts.start(A, *before, sys.executable, "-c", script)
        assert found.process.wait(20) == 0, found.output
        ids.append(found.output.strip().split("-"))
    assert (ids[0][0] == ids[1][0], ids[0][1] == ids[1][1]) == (True, False)
    command = (sys.executable, "-m", "dynamo", *AGG, *WORKERS, "--supervise", "--VllmWorker.ServiceArgs.workers=1")
    private = hosts.start(A, *apart, *command, **INFRA).ready()
    (own,) = [i for i, address in instances(hosts).items() if address.startswith(A)]
    body = {"model": "dynamo-tiny", "prompt": "Hello", "max_tokens": 5, "nvext": {"backend_instance_id": own}}

    async def there() -> int:
        async with client(hosts) as http:
            return (await http.post("/v1/completions", json=body)).status_code

    assert asyncio.run(there()) == 200
    assert private.stop() == 0


def test_prompts_are_computed_on_the_other_host(hosts: Hosts, tmp_path: Path) -> None:
    """Disaggregated: the decode worker on A, the prefill worker on B."""
    graph = ("serve", "graphs.disagg:Frontend", "-f", "configs/disagg_mock.yaml", "--Frontend.port=8100")
    graph += tuple(
        f"--{name}.ServiceArgs.dynamo.namespace=apart" for name in ("Processor", "VllmWorker", "PrefillWorker")
    )
    prefill = hosts.dynamo(B, *graph, "--service-name", "PrefillWorker", DYNAMO_KV_SECRET="the same")
    decode = hosts.dynamo(A, *graph, "--depends", "PrefillWorker=elsewhere", DYNAMO_KV_SECRET="the same").ready()
    prefill.ready()
    body = json.dumps({"model": "dynamo-tiny", "prompt": [100 + i % 700 for i in range(3000)], "max_tokens": 5})
    script = f"""
import httpx
for _ in range(3):
    answer = httpx.post("http://127.0.0.1:8100/v1/completions", content={body!r}, timeout=30)
    assert answer.status_code == 200, answer.text
print(httpx.get("http://127.0.0.1:8100/metrics").text)
"""
    asked = hosts.start(A, sys.executable, "-c", script)
    assert asked.process.wait(60) == 0, asked.output
    for name in ("remote_prefills", "kv_transfer_bytes"):
        assert re.search(rf"^dynamo_disagg_{name}_total\{{.*\}} [1-9]", asked.output, re.MULTILINE), asked.output
    assert not re.search(r"^dynamo_disagg_kv_transfer_failures_total\{.*\} [1-9]", asked.output, re.MULTILINE)
    assert prefill.stop() == decode.stop() == 0


def test_nothing_is_left(hosts: Hosts) -> None:
    graphs = [command for command in hosts.commands if command.process.poll() is None]
    for command in reversed(graphs):
        command.stop()
    assert hosts.processes() == []

"""Prometheus, with the configuration that it gets, over running graphs: every query of the dashboards has an answer, and
those of what has died have none."""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo.transport.etcd import Etcd
from tests.deploy.conftest import BusyGraph
from tests.deploy.container import DEPLOY, METRICS, compose, here, running
from tests.deploy.dashboard import FILES, NOW, Query, queries
from tests.ports import free_port, free_ports
from tests.served import Served, Start, until

CONFIGURATION = DEPLOY / "metrics/prometheus.yml"
# Neither exporter is here: these queries can be parsed and not more.
WITHOUT_DATA = ("DCGM_", "gnatsd_")
# A legend may name it for engines of several data-parallel ranks, which the mock engine is not.
RARE_LABELS = {"dp_rank"}
WITHIN_S = 100


class Prometheus:
    def __init__(self, address: str, etcd: str, files: Path) -> None:
        self.address, self.etcd, self.files = address, etcd, files

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The samples, without those that are no number."""
        answer = httpx.get(f"{self.address}/api/v1/query", params={"query": expression}, timeout=10)
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        samples: list[dict[str, Any]] = answer.json()["data"]["result"]
        return [sample for sample in samples if not math.isnan(float(sample["value"][1]))]

    def answers(self, query: Query) -> bool:
        """A sample with all labels that the legend shows."""
        labels = query.legend - RARE_LABELS
        return any(labels <= sample["metric"].keys() for sample in self.ask(query.expression))

    def value(self, expression: str) -> float:
        """Of its only sample, which a panel with one value shows; 0 where there is none."""
        (value,) = [float(sample["value"][1]) for sample in self.ask(expression)] or [0.0]
        return value

    def targets(self, job: str) -> list[str]:
        """What is scraped, as often as it is."""
        found = httpx.get(f"{self.address}/api/v1/targets", timeout=10).json()["data"]["activeTargets"]
        return [each["labels"]["instance"] for each in found if each["labels"]["job"] == job]

    def up(self) -> set[tuple[str, str]]:
        """Job and instance of the targets that answered the last scrape."""
        return {(s["metric"]["job"], s["metric"]["instance"]) for s in self.ask("up == 1")}


def test_the_configuration_is_valid(prometheus: Path) -> None:
    ran = subprocess.run([prometheus / "promtool", "check", "config", CONFIGURATION], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def scraping(prometheus: Path, busy_graph: BusyGraph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus as the compose file starts it, with other ports and directories."""
    directory = tmp_path_factory.mktemp("prometheus")
    own, closed_port = free_ports(2)
    etcd = busy_graph.served.servers["ETCD_ENDPOINTS"].removeprefix("http://")
    configuration = directory / "prometheus.yml"
    frontend = busy_graph.served.url.removeprefix("http://")
    places = {"localhost:9091": busy_graph.metrics, "localhost:8000": frontend, "localhost:2379": etcd}
    places |= dict.fromkeys(("localhost:9092", "localhost:9093", "localhost:7777"), f"127.0.0.1:{closed_port}")
    configuration.write_text(here(CONFIGURATION.read_text(), places))
    shutil.copytree(CONFIGURATION.parent / "targets", directory / "targets")
    changes = {
        "/etc/prometheus/prometheus.yml": str(configuration),
        "path=/prometheus": f"path={directory / 'data'}",
        "0.0.0.0:9090": f"127.0.0.1:{own}",
    }
    service = compose(METRICS)["services"]["prometheus"]
    with running(service, changes, {":9090/": f":{own}/"}, [str(prometheus / "prometheus")]):
        yield Prometheus(f"http://127.0.0.1:{own}", etcd, directory / "targets")


async def write(etcd: str) -> None:
    """Write to etcd, as starts, ends and live settings of processes do; a working graph does not."""
    async with Etcd.connect(f"http://{etcd}") as client:
        await client.put("deploy", b"written")


@pytest.mark.timeout(240)
def test_every_query_of_the_dashboards_has_an_answer(scraping: Prometheus, busy_graph: BusyGraph) -> None:
    asked = [query for file in FILES for query in queries(file)]
    without = [query for query in asked if any(name.startswith(WITHOUT_DATA) for name in query.names)]
    assert len(without) == 7
    assert all(scraping.ask(query.expression) == [] for query in without)
    left, deadline = [query for query in asked if query not in without], time.monotonic() + WITHIN_S
    while left and time.monotonic() < deadline:
        busy_graph.work()
        asyncio.run(write(scraping.etcd))
        left = [query for query in left if not scraping.answers(query)]
    assert [query.place for query in left] == []


def test_every_job_with_a_running_program_is_scraped(scraping: Prometheus, busy_graph: BusyGraph) -> None:
    until(lambda: scraping.up() == {("dynamo", busy_graph.metrics), ("etcd", scraping.etcd)}, "both are up")
    until(lambda: len(scraping.ask("up")) == 3, "the one without a program is known to be down")


def test_a_target_in_several_lists_is_scraped_once(scraping: Prometheus, busy_graph: BusyGraph) -> None:
    """The lists of the metrics port and of the Frontend; two urls that do not respond add nothing."""
    for address in (f"http://{busy_graph.metrics}", busy_graph.served.url):
        (group,) = httpx.get(f"{address}/metrics/targets", timeout=10).json()
        assert group["targets"] == [busy_graph.metrics]
    assert scraping.targets("dynamo") == [busy_graph.metrics]


def test_gpu_exporters_are_read_from_a_file(scraping: Prometheus) -> None:
    assert scraping.targets("dcgm") == []
    (file,) = scraping.files.iterdir()
    file.write_text(re.sub("^# -", "-", file.read_text(), flags=re.MULTILINE))
    until(lambda: scraping.targets("dcgm") == ["localhost:9401"], "the change is read")
    file.write_text("")
    until(lambda: scraping.targets("dcgm") == [], "that too")


@pytest.mark.timeout(240)
def test_another_host_is_added_and_removed_automatically(
    scraping: Prometheus, busy_graph: BusyGraph, serve_graph: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other host has its own `dynamo serve` and metrics port; both hosts are this machine."""
    for name, value in busy_graph.served.servers.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    options = ("-f", "configs/disagg_router_mock.yaml", "--VllmWorker.ServiceArgs.workers=2", f"--metrics-port={port}")
    alone = ("--service-name", "VllmWorker", "--infra", "external")
    other = serve_graph(*options, *alone, graph="graphs.disagg_router:Frontend")
    address = f"127.0.0.1:{port}"
    until(lambda: ("dynamo", address) in scraping.up(), "it is found", 60)
    workers = 'count by (instance) (llm_kv_blocks_total{service="VllmWorker"})'
    found = {busy_graph.metrics: "2", address: "2"}
    until(
        lambda: {s["metric"]["instance"]: s["value"][1] for s in scraping.ask(workers)} == found, "workers of both", 60
    )
    other.process.terminate()
    assert other.process.wait(40) == 0
    until(lambda: address not in {s["metric"]["instance"] for s in scraping.ask("up")}, "it has left the list", 60)


# Of the past, not of now: what happened within the time shown.
HISTORY = ("Restarts", "Migrations")
# They count what is dead.
ALARMS = ("Not ready", "Hosts down")


def values_of_now(choice: dict[str, str], without: tuple[str, ...] = ()) -> list[Query]:
    """Return the single-value panels, with shorter time windows so that the test need not wait for the real ones."""
    found = [query for file in FILES for query in queries(file, choice, NOW)]
    found = [query._replace(expression=re.sub(r"\[[15]m\]", "[20s]", query.expression)) for query in found]
    return [query for query in found if not query.place.endswith((*HISTORY, *ALARMS, *without))]


def alarm(title: str, choice: dict[str, str]) -> str:
    """Return the expression of the panel."""
    (found,) = [q for file in FILES for q in queries(file, choice, NOW) if q.place.endswith(f": {title}")]
    return found.expression


def shown(prometheus: Prometheus, asked: list[Query]) -> list[str]:
    """Return the panels that show a value other than 0."""
    return [q.place for q in asked if any(float(s["value"][1]) != 0 for s in prometheus.ask(q.expression))]


@pytest.mark.timeout(240)
def test_a_dead_worker_is_reported_and_has_no_samples(scraping: Prometheus, busy_graph: BusyGraph) -> None:
    worker = {"service": "VllmWorker", "worker": "2"}
    # Those that are of a worker: the others go on with the other worker.
    asked = [query for query in values_of_now(worker) if 'worker=~"2"' in query.expression]
    assert {query.place.partition(": ")[2] for query in asked} >= {"Ready", "Workers", "Waiting", "Prefix hit rate"}
    until(lambda: scraping.value(alarm("Not ready", {})) == 0, "all are ready", 60)
    until(lambda: len(shown(scraping, asked)) >= 2, "it is ready, and a worker", 60)
    (pid,) = busy_graph.served.pids("--service-name VllmWorker --worker-id 2 ")
    os.kill(pid, signal.SIGSTOP)  # a killed one would be there again before a scrape has seen that it was not
    try:
        until(lambda: scraping.value(alarm("Not ready", worker)) == 1, "it is reported", 60)
        until(lambda: shown(scraping, asked) == [], "no panel shows it", 60)
        assert scraping.value(alarm("Ready", {"service": "VllmWorker"})) == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: scraping.value(alarm("Not ready", {})) == 0, "it is back", 60)


class OtherGraph:
    """A whole graph in its own namespace, with the NATS and etcd of the busy one."""

    NAMESPACE = "other"
    SERVICES = ("Frontend", "Processor", "Router", "VllmWorker", "PrefillWorker")

    def __init__(self, serve: Callable[..., Served]) -> None:
        port = free_port()
        self.metrics = f"127.0.0.1:{port}"
        options = [f"--{name}.ServiceArgs.dynamo.namespace={self.NAMESPACE}" for name in self.SERVICES]
        options += [f"--{name}.ServiceArgs.workers=1" for name in self.SERVICES]
        options += ["-f", "configs/disagg_router_mock.yaml", "--infra", "external", f"--metrics-port={port}"]
        self.served = serve(*options, graph="graphs.disagg_router:Frontend").ready()

    def ask(self, model: str = "dynamo-tiny") -> int:
        """The status of a request's answer."""
        body = {"model": model, "prompt": "hello", "max_tokens": 20}
        return httpx.post(f"{self.served.url}/v1/completions", json=body, timeout=60).status_code


@pytest.mark.timeout(240)
def test_a_dead_host_has_no_samples_and_a_first_error_is_shown(
    scraping: Prometheus, busy_graph: BusyGraph, serve_graph: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in busy_graph.served.servers.items():
        monkeypatch.setenv(name, value)
    graph, choice = OtherGraph(serve_graph), {"namespace": OtherGraph.NAMESPACE}
    asked = values_of_now(choice)
    assert len(asked) >= 12
    served = 'sum(dynamo_frontend_requests_total{namespace="other"})'
    until(lambda: len(scraping.ask(served)) == 1, "it is found", 60)
    assert scraping.value(served) == 0
    assert graph.ask("no-model") == 404
    errors = [
        q for file in FILES for q in queries(file, choice) if q.place.endswith(("Errors", "Errors and disconnects"))
    ]
    assert len(errors) == 2
    until(lambda: set(shown(scraping, errors)) == {query.place for query in errors}, "the first error is shown", 60)
    assert graph.ask() == 200
    until(lambda: {"serving: Requests", "serving: Ready", "kv: Workers"} <= set(shown(scraping, asked)), "it works", 60)

    graph.served.process.kill()  # with it all its processes end, and none can take its lease back
    graph.served.process.wait(20)
    until(lambda: scraping.value(alarm("Hosts down", {})) == 1, "the host is reported", 60)
    until(lambda: shown(scraping, asked) == [], "no panel shows it", 60)
    until(lambda: graph.metrics not in scraping.targets("dynamo"), "its leases have ended", 60)
    until(lambda: scraping.value(alarm("Hosts down", {})) == 0, "nor is it reported any more", 60)
    assert scraping.up() >= {("dynamo", busy_graph.metrics)}

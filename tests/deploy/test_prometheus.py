"""Prometheus, with the configuration that it gets, over a running graph: every query of the dashboards has an answer."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo.serve.infra import free_ports
from tests.deploy.conftest import BusyGraph
from tests.deploy.container import DEPLOY, METRICS, compose, here, running
from tests.deploy.dashboard import FILES, Query, queries
from tests.graph.conftest import Served
from tests.graph.test_agg_router import environment
from tests.graph.test_disagg import until

CONFIGURATION = DEPLOY / "metrics/prometheus.yml"
# Without a GPU there is no DCGM exporter: these queries can be parsed and not more.
WITHOUT_DATA = ("DCGM_",)
# A legend may name it for engines of several data-parallel ranks, which the mock engine is not.
RARE_LABELS = {"dp_rank"}
WITHIN_S = 100


class Prometheus:
    def __init__(self, address: str, etcd: str) -> None:
        self.address, self.etcd = address, etcd

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

    def up(self) -> set[tuple[str, str]]:
        """Job and instance of the targets that answered the last scrape."""
        return {(s["metric"]["job"], s["metric"]["instance"]) for s in self.ask("up == 1")}


def test_the_configuration_is_valid(prometheus: Path) -> None:
    ran = subprocess.run([prometheus / "promtool", "check", "config", CONFIGURATION], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def scraping(prometheus: Path, busy_graph: BusyGraph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """As the compose file starts it; only ports and directories are others."""
    directory = tmp_path_factory.mktemp("prometheus")
    own, nobody = free_ports(2)
    etcd = environment(busy_graph.served)["ETCD_ENDPOINTS"].removeprefix("http://")
    configuration = directory / "prometheus.yml"
    places = {"localhost:9091": busy_graph.metrics, "localhost:2379": etcd}
    places |= dict.fromkeys(("localhost:7777", "localhost:9401"), f"127.0.0.1:{nobody}")
    configuration.write_text(here(CONFIGURATION.read_text(), places))
    changes = {
        "/etc/prometheus/prometheus.yml": str(configuration),
        "path=/prometheus": f"path={directory / 'data'}",
        "0.0.0.0:9090": f"127.0.0.1:{own}",
    }
    service = compose(METRICS)["services"]["prometheus"]
    with running(service, changes, {":9090/": f":{own}/"}, [str(prometheus / "prometheus")]):
        yield Prometheus(f"http://127.0.0.1:{own}", etcd)


@pytest.mark.timeout(240)
def test_every_query_of_the_dashboards_has_an_answer(scraping: Prometheus, busy_graph: BusyGraph) -> None:
    asked = [query for file in FILES for query in queries(file)]
    without = [query for query in asked if any(name.startswith(WITHOUT_DATA) for name in query.names)]
    assert len(without) == 3
    assert [scraping.ask(query.expression) for query in without] == [[], [], []]
    left, deadline = [query for query in asked if query not in without], time.monotonic() + WITHIN_S
    while left and time.monotonic() < deadline:
        busy_graph.work()
        left = [query for query in left if not scraping.answers(query)]
    assert [query.place for query in left] == []


def test_every_job_whose_program_runs_is_scraped(scraping: Prometheus, busy_graph: BusyGraph) -> None:
    until(lambda: scraping.up() == {("dynamo", busy_graph.metrics), ("etcd", scraping.etcd)}, "both are up")
    until(lambda: len(scraping.ask("up")) == 4, "those without a program are known to be down")


@pytest.mark.timeout(240)
def test_another_host_comes_and_goes_by_itself(
    scraping: Prometheus, busy_graph: BusyGraph, serve_graph: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a `dynamo serve` and a metrics port of its own; both hosts are this machine."""
    for name, value in environment(busy_graph.served).items():
        monkeypatch.setenv(name, value)
    port = free_ports(1)[0]
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

"""The metrics port of `dynamo serve`, scraped as Prometheus does: while processes die or stop, and without NATS and etcd."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.ports import free_port, free_ports
from tests.served import ROOT, Served, Start

SERVICES = [("Frontend", "1"), ("Processor", "1"), ("VllmWorker", "1"), ("VllmWorker", "2")]
LIMIT_S = 20


class Host:
    """A graph with a port of its own, and the metrics port of its host."""

    def __init__(self, served: Served, port: int, system_port: int) -> None:
        self.served, self.port, self.system_port = served, port, system_port

    def get(self, page: str = "/metrics") -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{page}", trust_env=False, timeout=LIMIT_S).raise_for_status()

    def families(self) -> dict[str, Metric]:
        return parsed(self.get().text)

    def up(self) -> dict[tuple[str, str], float]:
        return by_process(self.families(), "dynamo_supervisor_process_up")

    def until(self, expected: dict[tuple[str, str], float]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while (seen := self.up()) != expected:
            assert time.monotonic() < deadline, seen
            time.sleep(0.02)

    def pid(self, service: str, worker: str) -> int:
        (pid,) = self.served.pids(f"--service-name {service} --worker-id {worker} ")
        return pid


def parsed(text: str) -> dict[str, Metric]:
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(types) == len(set(types))  # Prometheus refuses a family that comes twice
    families = {family.name: family for family in text_string_to_metric_families(text)}
    series = [(s.name, *sorted(s.labels.items())) for family in families.values() for s in family.samples]
    assert len(series) == len(set(series))
    return families


def by_process(families: dict[str, Metric], name: str) -> dict[tuple[str, str], float]:
    return {(s.labels["service"], s.labels["worker"]): s.value for s in families[name].samples}


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def host(serve_graph: Start) -> Host:
    port, system_port = free_ports(2)
    system = "--Processor.ServiceArgs.envs.DYNAMO_SYSTEM_APP_"
    arguments = ("--VllmWorker.ServiceArgs.workers=2", f"--metrics-port={port}")
    arguments += (f"{system}ENABLED=true", f"{system}PORT={system_port}", f"{system}HOST=127.0.0.1")
    return Host(serve_graph("-f", "configs/agg_mock.yaml", *arguments).ready(), port, system_port)


def test_one_scrape_shows_every_process_of_the_host(host: Host) -> None:
    assert f"\nmetrics: http://127.0.0.1:{host.port}/metrics\n" in host.served.output
    request = {"model": "dynamo-tiny", "prompt": "hello", "max_tokens": 2}
    httpx.post(f"{host.served.url}/v1/completions", json=request).raise_for_status()
    assert httpx.post(f"{host.served.url}/v1/completions", json={**request, "model": "x" * 99}).status_code == 404
    assert httpx.post(f"{host.served.url}/v1/completions", json={**request, "max_tokens": -1}).status_code == 400
    answer = host.get()
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = parsed(answer.text)
    assert sorted(by_process(families, "dynamo_supervisor_process_up")) == SERVICES
    assert set(by_process(families, "dynamo_supervisor_process_up").values()) == {1}
    assert set(by_process(families, "dynamo_supervisor_restarts").values()) == {0}
    memory_of_trees = by_process(families, "dynamo_supervisor_tree_resident_bytes")
    assert sorted(memory_of_trees) == SERVICES
    assert min(memory_of_trees.values()) > 1 << 20
    assert min(by_process(families, "dynamo_supervisor_tree_cpu_seconds").values()) > 0
    labels = [sample.labels for family in families.values() for sample in family.samples]
    assert {found["namespace"] for found in labels} == {"dynamo"}
    assert {(found["service"], found["worker"]) for found in labels} == set(SERVICES)
    memory = [sample.labels for sample in families["process_resident_memory_bytes"].samples]
    assert sorted(labels["service"] for labels in memory) == [service for service, _ in SERVICES]
    assert len({labels["worker_id"] for labels in memory}) == 4
    for name, families_of in (("llm_requests_total_slots", 2), ("llm_kv_hit_rate_percent", 2)):
        assert len(families[name].samples) == families_of
    requests = [s for s in families["dynamo_frontend_requests"].samples if s.name.endswith("_total") and s.value]
    assert {(s.labels["status"], s.labels["error_type"], s.labels["model"]) for s in requests} == {
        ("success", "", "dynamo-tiny"),
        ("error", "not_found", ""),
        ("error", "validation", ""),
    }
    assert {(s.labels["service"], s.value) for s in requests} == {("Frontend", 1)}


def test_the_frontends_page_has_the_load_of_the_workers(host: Host) -> None:
    deadline = time.monotonic() + LIMIT_S
    while "llm_load_avg" not in (text := httpx.get(f"{host.served.url}/metrics").raise_for_status().text):
        assert time.monotonic() < deadline, text  # a busy process may miss the first scrapes
    families = parsed(text)
    for name in ("llm_load_avg", "llm_load_std"):
        (sample,) = families[name].samples
        assert sample.labels == {"component": "VllmWorker", "endpoint": "generate"}
        assert sample.value >= 0


def test_a_process_shows_itself_on_its_system_app(host: Host) -> None:
    answer = httpx.get(f"http://127.0.0.1:{host.system_port}/metrics", trust_env=False).raise_for_status()
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = parsed(answer.text)
    assert {s.labels["service"] for f in families.values() for s in f.samples} == {"Processor"}
    assert families["process_open_fds"].samples


def test_a_worker_that_dies_is_down_and_then_restarted(host: Host) -> None:
    everybody = dict.fromkeys(SERVICES, 1.0)
    host.until(everybody)
    os.kill(host.pid("VllmWorker", "2"), signal.SIGKILL)
    host.until({**everybody, ("VllmWorker", "2"): 0})
    host.until(everybody)
    families = host.families()
    assert by_process(families, "dynamo_supervisor_restarts") == {**dict.fromkeys(SERVICES, 0), ("VllmWorker", "2"): 1}
    assert len(families["llm_kv_blocks_total"].samples) == 2


def test_a_process_that_is_stopped_costs_a_scrape_two_seconds(host: Host) -> None:
    everybody = dict.fromkeys(SERVICES, 1.0)
    host.until(everybody)
    with stopped(host.pid("VllmWorker", "1")):
        host.until({**everybody, ("VllmWorker", "1"): 0})  # httpx waits no longer than LIMIT_S
    host.until(everybody)


def test_it_works_without_nats_and_etcd(host: Host) -> None:
    host.until(dict.fromkeys(SERVICES, 1.0))
    nats, etcd = host.served.pids("/nats-server "), host.served.pids("/etcd ")
    assert len(nats) == len(etcd) == 1
    with stopped(*nats, *etcd):
        time.sleep(1.5)  # a page is kept for a second
        assert host.up() == dict.fromkeys(SERVICES, 1.0)
        (group,) = host.get("/metrics/targets").json()
        assert f"127.0.0.1:{host.port}" in group["targets"]
        health = httpx.get(f"{host.served.url}/health", trust_env=False, timeout=LIMIT_S)
        assert (health.status_code, health.json()["status"]) == (200, "healthy")


def alone_reports(page: str) -> dict[str, Metric]:
    return parsed(httpx.get(page, trust_env=False).raise_for_status().text)


def test_a_service_alone_has_a_port_and_all_are_found(host: Host, tmp_path: Path) -> None:
    port = free_port()
    command = ["serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "--service-name", "Processor"]
    env = {
        **os.environ,
        **host.served.servers,
        "DYN_METRICS_PORT": str(port),
    }
    with (tmp_path / "output").open("wb") as output:
        alone = subprocess.Popen(
            [sys.executable, "-m", "dynamo", *command], cwd=ROOT, env=env, stdout=output, stderr=output
        )
    try:
        both = sorted(f"127.0.0.1:{each}" for each in (host.port, port))
        deadline = time.monotonic() + 3 * LIMIT_S
        while host.get("/metrics/targets").json() != [{"targets": both, "labels": {}}]:
            assert alone.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.05)
        base = f"http://127.0.0.1:{port}/metrics"
        assert f"metrics: {base}\n" in (tmp_path / "output").read_text()
        while not by_process(families := alone_reports(base), "dynamo_supervisor_process_up")["Processor", "1"]:
            assert time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.05)
        assert families["process_open_fds"].samples
        assert {s.labels["service"] for f in families.values() for s in f.samples} == {"Processor"}
        for page in (f"{base}/targets", f"{host.served.url}/metrics/targets"):
            assert httpx.get(page, trust_env=False).json() == [{"targets": both, "labels": {}}]
    finally:
        alone.send_signal(signal.SIGTERM)
        alone.wait(40)
    assert host.get("/metrics/targets").json()[0]["targets"] == [f"127.0.0.1:{host.port}"]


def test_a_port_that_is_taken_is_one_error_before_anything_starts(host: Host) -> None:
    command = ["serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "--infra", "embedded"]
    command += ["--port", str(free_port()), "--metrics-port", str(host.port)]
    done = subprocess.run(
        [sys.executable, "-m", "dynamo", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == (
        "",
        f"error: cannot listen on 127.0.0.1:{host.port} for metrics: Address already in use\n"
        f"hint: choose another port: --metrics-port {host.port + 1}, or 0 for none\n",
    )


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--metrics-port", "PORT"], "--metrics-port PORT: the graph's own HTTP has this port"),
        (["--metrics-host", "192.0.2.8"], "cannot listen on 192.0.2.8 for metrics: Cannot assign requested address"),
        (["--metrics-host", "192.0.2.8", "--dry-run"], "cannot listen on 192.0.2.8 for metrics: Cannot assign"),
    ],
)
def test_what_cannot_be_is_one_error_before_anything_starts(arguments: list[str], fact: str) -> None:
    command = ["serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "--infra", "embedded"]
    port = str(free_port())
    command += ["--port", port, *(argument.replace("PORT", port) for argument in arguments)]
    done = subprocess.run(
        [sys.executable, "-m", "dynamo", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: {fact.replace('PORT', port)}")
    assert hint.startswith("hint: ")


def test_a_second_graph_takes_the_next_port_and_0_takes_none(serve_graph: Start) -> None:
    with_one = serve_graph("-f", "configs/agg_mock.yaml")
    without = serve_graph("-f", "configs/agg_mock.yaml", "--metrics-port", "0").ready()
    first = re.search(r"^metrics: (http://127\.0\.0\.1:9\d+/metrics)$", with_one.ready().output, re.MULTILINE)
    assert first, with_one.output
    assert parsed(httpx.get(first[1], trust_env=False).text)["dynamo_supervisor_process_up"].samples
    assert "metrics:" not in without.output
    assert httpx.get(f"{without.url}/metrics/targets").json() == [{"targets": [], "labels": {}}]
    assert with_one.stop() == without.stop() == 0

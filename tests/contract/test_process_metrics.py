"""Metrics of several processes, collected over a real NATS; and the hosts' metrics ports, found in a real etcd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dynamo.http.scrape_targets import ScrapeTargets
from dynamo.launcher.embedded_servers import Infra
from dynamo.openai.app import create_app
from dynamo.rpc import metrics as process_metrics
from dynamo.rpc.metrics import ProcessMetrics
from dynamo.rpc.runtime import Runtime
from tests.contract.rpc_steps import namespace, soon
from tests.http_backend import FakeBackend

__all__ = ["namespace"]  # a fixture

Join = Callable[..., Awaitable[Runtime]]
SERVICES = ("Frontend", "Processor", "Worker")
WAIT_S = 1.5


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than in production: a busy machine must not make a process late."""
    monkeypatch.setattr(process_metrics, "SCRAPE_WAIT_S", WAIT_S)


class Broken(Collector):
    """While it is broken, its process cannot render its metrics."""

    broken = True

    def collect(self) -> Iterator[Metric]:
        if self.broken:
            raise RuntimeError("broken")
        yield GaugeMetricFamily("repaired", "It is not broken.", 1)


@asynccontextmanager
async def joining(nats_url: str, etcd_endpoints: str, namespace: str) -> AsyncIterator[Join]:
    made: list[Runtime] = []

    async def join(service: str, namespace: str = namespace, graph: tuple[str, ...] = SERVICES) -> Runtime:
        runtime = Runtime(nats_url=nats_url, etcd_endpoints=etcd_endpoints, name=service)
        runtime.metrics.identify(namespace, service, [(namespace, name) for name in graph])
        made.append(runtime)
        await runtime.connect()
        return runtime

    yield join
    await asyncio.gather(*(runtime.close() for runtime in made))


@pytest.fixture
async def join(nats_server: str, etcd_server: str, namespace: str) -> AsyncIterator[Join]:
    """A process of a service: its runtime, connected."""
    async with joining(nats_server, etcd_server, namespace) as join:
        yield join


def who(texts: list[bytes]) -> list[str]:
    """Return the worker_id of each text, which all its samples have."""
    found = []
    for text in texts:
        families = text_string_to_metric_families(text.decode())
        (worker_id,) = {sample.labels["worker_id"] for family in families for sample in family.samples}
        found.append(worker_id)
    return found


def ids(*runtimes: Runtime) -> set[str]:
    return {runtime.metrics.worker_id for runtime in runtimes}


async def timed(metrics: ProcessMetrics) -> tuple[set[str], float]:
    started = time.monotonic()
    texts = await metrics.gather()
    found = who(texts)
    assert len(found) == len(set(found))
    return set(found), time.monotonic() - started


async def test_all_processes_respond_except_a_broken_one(join: Join) -> None:
    frontend, first, second, third = [await join(name) for name in ("Frontend", "Processor", "Worker", "Worker")]
    broken = Broken()
    third.metrics.registry.register(broken)
    assert (await timed(frontend.metrics))[0] == ids(first, second)

    broken.broken = False
    await frontend.metrics.gather()  # does not wait for it: it may or may not be in time
    await soon(lambda: third.metrics.worker_id in frontend.metrics._responsive)
    assert (await timed(frontend.metrics))[0] == ids(first, second, third)

    broken.broken = True
    found, seconds = await timed(frontend.metrics)
    assert found == ids(first, second)
    assert seconds >= WAIT_S * 0.9
    waited = [(await timed(frontend.metrics))[1] for _ in range(3)]
    assert min(waited) < 1.0  # only the first one waited for it


async def test_instances_that_discovery_has_are_waited_for(join: Join, namespace: str) -> None:
    frontend = await join("Frontend")
    assert await frontend.metrics.gather() == []
    client = await frontend.client(namespace, "Worker", "run")
    workers = [await join("Worker") for _ in range(3)]
    for worker in workers:
        await worker.serve(namespace, "Worker", "run", str)
    await client.wait_for_instances(3, timeout_s=5)
    assert (await timed(frontend.metrics))[0] == ids(*workers)


async def test_graphs_that_share_a_nats_do_not_mix(join: Join, namespace: str) -> None:
    frontend, worker = await join("Frontend"), await join("Worker")
    await join("Worker", f"{namespace}x")
    await join("Other", graph=("Other",))
    assert (await timed(frontend.metrics))[0] == ids(worker)


async def test_each_of_two_frontends_has_the_metrics_of_the_other(join: Join, namespace: str) -> None:
    frontends = [await join("Frontend") for _ in range(2)]
    worker = await join("Worker")
    Counter("jobs", "Jobs done.", registry=worker.metrics.registry).inc(2)
    apps = [create_app(FakeBackend(), processes=frontend.metrics) for frontend in frontends]
    for app, mine, other in zip(apps, frontends, reversed(frontends), strict=True):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            await http.post("/v1/completions", content=b"{")  # counted as rejected
            text = (await http.get("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        memory = families["process_resident_memory_bytes"].samples
        assert {s.labels["worker_id"] for s in memory} == ids(mine, other, worker)
        assert [s.labels["service"] for s in memory].count("Frontend") == 2
        (jobs,) = [s for s in families["jobs"].samples if s.name == "jobs_total"]
        whose = {"namespace": namespace, "service": "Worker", "worker": "1", "worker_id": worker.metrics.worker_id}
        assert (jobs.labels, jobs.value) == (whose, 2)
        requests = [s.labels for s in families["dynamo_frontend_requests"].samples if s.name.endswith("_total")]
        assert [labels for labels in requests if "worker_id" not in labels]  # its own, as usual
        if mine is frontends[1]:
            assert ids(other) <= {labels.get("worker_id", "") for labels in requests}
        assert text.count("# TYPE dynamo_frontend_requests_total ") == 1


async def test_without_nats_a_frontend_has_its_own_metrics(private_infra: Infra, namespace: str) -> None:
    async with joining(private_infra.nats_url, private_infra.etcd_endpoints, namespace) as join:
        frontend, worker = await join("Frontend"), await join("Worker")
        assert (await timed(frontend.metrics))[0] == ids(worker)
        private_infra.processes["nats"].kill()
        await soon(lambda: not frontend.nats.connected, 5)
        assert await frontend.metrics.gather() == []
        assert 0 < frontend.nats_away_s < 60
        assert b"process_resident_memory_bytes{" in frontend.metrics.text()
        await private_infra.restart_nats()
        await soon(lambda: frontend.nats.connected and worker.nats.connected, 10)
        assert frontend.nats_away_s == 0
        await frontend.metrics.gather()  # the subscriptions may not be restored yet
        await soon(lambda: worker.metrics.worker_id in frontend.metrics._responsive)
        assert (await timed(frontend.metrics))[0] == ids(worker)


async def test_every_process_publishes_its_hosts_metrics_port(
    private_infra: Infra, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with joining(private_infra.nats_url, private_infra.etcd_endpoints, namespace) as join:
        targets = []
        for address in ("10.0.0.1:9091", "10.0.0.1:9091", "10.0.0.2:9092", ""):
            if address:
                monkeypatch.setenv("DYNAMO_METRICS_ADDRESS", address)
            else:
                monkeypatch.delenv("DYNAMO_METRICS_ADDRESS")
            runtime = await join("Worker")
            targets.append(ScrapeTargets(runtime))
            await targets[-1].publish()
        every = ["10.0.0.1:9091", "10.0.0.2:9092"]
        assert [await each.addresses() for each in targets] == [every] * 4
        await runtime.publish("metrics/other", "http://10.0.0.3:9091/metrics")
        await runtime.publish("metrics/another", {"port": 9091})
        assert await targets[0].addresses() == every  # an invalid address would spoil the whole list

        app = create_app(FakeBackend(), targets=targets[3].addresses, api_keys=["secret"])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            answer = await http.get("/metrics/targets")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == [{"targets": every, "labels": {}}]

        await targets[2]._runtime.close()
        assert await targets[0].addresses() == every[:1]
        private_infra.processes["etcd"].kill()
        await private_infra.processes["etcd"].wait()
        assert await targets[1].addresses() == every  # the last known ones
        assert await targets[3].addresses() == every
        await private_infra.restart_etcd()

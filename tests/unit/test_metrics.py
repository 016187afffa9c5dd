"""Metrics of several processes in one text, read back with Prometheus' own parser; and an engine's metrics."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.engines.mock.engine import MockEngine
from dynamo.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    ModelNotFoundError,
    NoInstancesError,
    OverloadedError,
)
from dynamo.http.prometheus_text import family, http_sd, load, merge
from dynamo.kv_router.messages import RouteRequest
from dynamo.kv_router.metrics import RouterMetrics
from dynamo.kv_router.router import KvRouter
from dynamo.llm.engine import EngineInfo, EngineStats, KvTransfers
from dynamo.llm.engine_metrics import EngineCollector, load_metrics
from dynamo.llm.protocol import GenerateRequest, Sampling
from dynamo.openai.metrics import error_type
from dynamo.rpc.metrics import ProcessMetrics, label
from dynamo.sdk import ServiceContext, metrics_registry

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def families(text: bytes) -> list[Metric]:
    """Parse a text, and check that no family comes twice: Prometheus would refuse it, the parser does not."""
    names = [line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE ")]
    assert len(names) == len(set(names))
    return list(text_string_to_metric_families(text.decode()))


def samples(text: bytes) -> Samples:
    found = [(s.name, frozenset(s.labels.items()), s.value) for family in families(text) for s in family.samples]
    assert len({(name, labels) for name, labels, _ in found}) == len(found)
    return {(name, labels): value for name, labels, value in found}


def of(text: bytes, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


def process(number: int, service: str = "Worker") -> ProcessMetrics:
    found = ProcessMetrics(number, {})
    found.identify("test", service, [("test", service)], 3)
    return found


def whose(worker_id: str, service: str = "Worker") -> dict[str, str]:
    """Return the labels of all samples of a process."""
    return {"namespace": "test", "service": service, "worker": "3", "worker_id": worker_id}


# -- merging

kinds = st.sampled_from([Counter, Gauge, Histogram])
values = st.dictionaries(st.text(max_size=8), st.floats(0, 1e9), max_size=4)
texts = st.lists(st.dictionaries(st.sampled_from(["a", "b_c", "a_b"]), st.tuples(st.text(), values), max_size=3))


@given(texts, st.data())
def test_merging_keeps_each_sample_once(given: list[dict[str, Any]], data: st.DataObject) -> None:
    kind_of = {name: data.draw(kinds) for name in ("a", "b_c", "a_b")}
    written = []
    for number, metrics in enumerate(given):
        found = process(number)
        for name, (documentation, values) in metrics.items():
            metric = kind_of[name](name, documentation, ["x"], registry=found.registry)
            for x, value in values.items():
                getattr(metric.labels(x), {Counter: "inc", Gauge: "set", Histogram: "observe"}[kind_of[name]])(value)
        written.append(found.text())
    merged = merge(written)
    expected: Samples = {}
    for text in written:
        expected |= samples(text)
    assert samples(merged) == expected
    assert merge([merged]) == merged
    assert merge([merged, b""]) == merged


def test_labels_that_need_escaping_and_help_that_differs() -> None:
    written = []
    for number, documentation in enumerate(('first\n# HELP a "\\', "second")):
        found = process(number)
        Counter("a", documentation, ["x"], registry=found.registry).labels('"\\\n# HELP b ,}{').inc()
        written.append(found.text())
    merged = merge(written)
    (family,) = [family for family in families(merged) if family.name == "a"]
    assert family.documentation == 'first\n# HELP a "\\'
    for number in (0, 1):
        assert of(merged, "a_total", x='"\\\n# HELP b ,}{', **whose(str(number))) == 1
    assert len([s for s in family.samples if s.name == "a_total"]) == 2


def test_the_first_text_stays_as_it_is() -> None:
    own = CollectorRegistry()
    Histogram("taken_seconds", "Time.", ["model"], registry=own, buckets=(1, 2)).labels("m").observe(1.5)
    other = process(255)
    Histogram("taken_seconds", "Time of another.", ["model"], registry=other.registry, buckets=(1,)).labels(
        "m"
    ).observe(1)
    merged = merge([generate_latest(own), other.text()])
    assert merged.startswith(generate_latest(own))
    assert of(merged, "taken_seconds_bucket", model="m", le="2.0") == 1
    assert of(merged, "taken_seconds_bucket", model="m", le="1.0", **whose("ff")) == 1
    assert {family.name: family.type for family in families(merged)}["taken_seconds"] == "histogram"
    assert b"_created" not in merged


def test_a_metric_of_another_type_is_replaced_by_a_comment() -> None:
    first, second = process(1), process(2)
    Counter("a", "A.", registry=first.registry)
    Gauge("a_total", "A.", registry=second.registry)
    Info("b", "B.", registry=second.registry).info({"version": "1"})
    merged = merge([first.text(), second.text()])
    assert b"# samples of another process are left out, their type differs: a_total gauge\n" in merged
    assert [s.labels["worker_id"] for f in families(merged) for s in f.samples if s.name == "a_total"] == ["1"]
    assert of(merged, "b_info", version="1", **whose("2")) == 1


# -- the metrics of a process


def test_a_process_exports_its_resources_and_its_own_metrics() -> None:
    found = process(0xABC, "Processor")
    Gauge("mine", "Mine.", ["service"], registry=found.registry).labels("billing").set(7)
    shared = CollectorRegistry()
    Counter("shared", "Of the HTTP server.", registry=shared)
    found.share(shared)
    text, labels = found.text(), whose("abc", "Processor")
    assert of(text, "process_resident_memory_bytes", **labels) > 1 << 20
    assert of(text, "process_cpu_seconds_total", **labels) > 0
    assert of(text, "process_open_fds", **labels) >= 3
    assert of(text, "process_start_time_seconds", **labels) > 1e9
    assert of(text, "mine", exported_service="billing", **labels) == 7
    assert b"shared_total" not in text


def test_labels_of_the_process_win() -> None:
    added = {"service": "Worker", "worker_id": "a"}
    assert label({"x": "1"}, added) == {"x": "1", **added}
    assert label({"worker_id": "a", "x": "1"}, added) == {"x": "1", **added}
    assert label({"worker_id": "b"}, added) == {"exported_worker_id": "b", **added}
    assert label({"worker": "b", "x": "1"}, {**added, "worker": "2"}) == {"x": "1", **added, "worker": "b"}


def test_a_component_counts_with_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greeter:
        def __init__(self) -> None:
            self.greetings = Counter("greetings", "Greetings given.", registry=metrics_registry())

    for _ in range(2):  # as two tests would
        Greeter().greetings.inc()

    class Runtime:
        metrics = process(1)

    monkeypatch.setattr("dynamo.sdk.context._current", ServiceContext("VllmWorker", "dynamo", 1, 1, Runtime, print))
    Greeter().greetings.inc(3)
    assert metrics_registry() is Runtime.metrics.registry
    assert of(Runtime.metrics.text(), "greetings_total", **whose("1")) == 3


# -- engines


class Engine:
    def __init__(self, *ranks: EngineStats, transfers: KvTransfers | None = None) -> None:
        self.ranks, self.transfers = ranks, transfers

    def kv_transfers(self) -> KvTransfers | None:
        return self.transfers

    def stats(self) -> Iterable[EngineStats]:
        return list(self.ranks)


def scraped(engine: Any, info: EngineInfo) -> Iterator[tuple[str, dict[str, str], float]]:
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, info, component="VllmWorker", endpoint="generate", worker_id="a"))
    for found in families(generate_latest(registry)):
        for sample in found.samples:
            labels = dict(sample.labels)
            assert [labels.pop(name) for name in ("component", "endpoint", "worker_id")] == [
                "VllmWorker",
                "generate",
                "a",
            ]
            yield sample.name, labels, sample.value


def test_an_engine_is_read_when_it_is_scraped() -> None:
    engine: Any = Engine(EngineStats(0, 0, 0.0, 0, 0))
    info = EngineInfo(4096, 16, 200, slots=64)
    assert load_metrics(engine, info)["gpu_prefix_cache_hit_rate"] == 0
    engine.ranks = (EngineStats(3, 2, 0.25, 1000, 400),)
    assert sorted(scraped(engine, info)) == [
        ("llm_kv_blocks_active", {}, 50),
        ("llm_kv_blocks_total", {}, 200),
        ("llm_kv_hit_rate_percent", {}, 40),
        ("llm_prefix_cache_hits_total", {}, 400),
        ("llm_prefix_cache_queries_total", {}, 1000),
        ("llm_requests_active_slots", {}, 3),
        ("llm_requests_total_slots", {}, 64),
        ("llm_requests_waiting", {}, 2),
    ]
    assert load_metrics(engine, info) == {
        "request_active_slots": 3,
        "request_total_slots": 64,
        "num_requests_waiting": 2,
        "kv_active_blocks": 50,
        "kv_total_blocks": 200,
        "gpu_cache_usage_perc": 0.25,
        "gpu_prefix_cache_hit_rate": 0.4,
    }


def test_kv_transfers_are_counted_where_there_are_some() -> None:
    engine: Any = Engine(EngineStats(0, 0, 0.0, 0, 0), transfers=KvTransfers(5, 1, 1 << 20, 0.25, 2))
    found = {name: value for name, labels, value in scraped(engine, EngineInfo(4096, 16, 200)) if not labels}
    assert {name: value for name, value in found.items() if name.startswith("dynamo_disagg_")} == {
        "dynamo_disagg_kv_transfers_total": 5,
        "dynamo_disagg_kv_transfer_failures_total": 1,
        "dynamo_disagg_kv_transfer_bytes_total": 1 << 20,
        "dynamo_disagg_kv_transfer_seconds_total": 0.25,
        "dynamo_disagg_kv_unclaimed_total": 2,
    }


async def test_the_mock_engine_counts_its_transfers() -> None:
    options = {"speedup-ratio": 0, "block-size": 4, "kv-transfer": True, "kv-transfer-lease-s": 0.2}
    lender, taker = (MockEngine("dynamo-tiny", {**options, "mock-kv-bytes-per-token": 10}, print) for _ in range(2))
    request = GenerateRequest(list(range(8)), Sampling(max_tokens=1))
    for engine in (lender, taker):
        await engine.start()
    place = await lender.prefill(request)
    for _ in range(2):  # the second finds nothing there any more
        asked = msgspec.structs.replace(request, token_ids=[9, *range(7)], kv_transfer=place)
        assert [delta.finish_reason async for delta in taker.generate(asked)] == ["length"]
    await lender.prefill(request)  # never fetched
    async with asyncio.timeout(10):
        while not lender.kv_transfers().expired:
            await asyncio.sleep(0.01)
    found = taker.kv_transfers()
    assert (found.pulls, found.failures, found.bytes, found.expired) == (2, 1, 80, 0)
    assert found.seconds > 0
    assert lender.kv_transfers() == KvTransfers(expired=1)
    assert MockEngine("dynamo-tiny", {}, print).kv_transfers() is None
    for engine in (lender, taker):
        await engine.stop()


def test_ranks_have_labels_and_are_summed() -> None:
    engine: Any = Engine(EngineStats(3, 0, 0.5, 100, 100), EngineStats(1, 4, 0.1, 300, 0))
    info = EngineInfo(4096, 16, 200, ranks=2, slots=8)
    found = [(name, labels["dp_rank"], value) for name, labels, value in scraped(engine, info)]
    assert ("llm_kv_blocks_active", "0", 100) in found
    assert ("llm_kv_blocks_active", "1", 20) in found
    assert ("llm_requests_waiting", "1", 4) in found
    assert ("llm_kv_hit_rate_percent", "0", 100) in found
    found = load_metrics(engine, info)
    assert (found["kv_active_blocks"], found["kv_total_blocks"], found["request_active_slots"]) == (120, 400, 4)
    assert found["request_total_slots"] == 16
    assert math.isclose(found["gpu_cache_usage_perc"], 0.3)
    assert found["gpu_prefix_cache_hit_rate"] == 0.25


# -- the graph's load, and what the supervisor writes


@settings(deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["VllmWorker", "PrefillWorker"]), st.integers(0, 99)),
        st.lists(st.integers(0, 200), min_size=1, max_size=3),  # a worker's ranks
        max_size=6,
    )
)
def test_load_is_the_mean_and_deviation_over_the_workers_of_a_component(workers: dict[tuple[str, int], Any]) -> None:
    written, expected = [], dict[str, list[float]]()
    for (component, number), blocks in workers.items():
        engine: Any = Engine(*(EngineStats(0, 0, active / 200, 0, 0) for active in blocks))
        found = process(number, component)
        labels = {"component": component, "endpoint": "generate", "worker_id": found.worker_id}
        found.registry.register(EngineCollector(engine, EngineInfo(4096, 16, 200, len(blocks)), **labels))
        Gauge("llm_kv_blocks_active_of_another", "No such metric.", registry=found.registry).set(1e6)
        written.append(found.text())
        expected.setdefault(component, []).append(sum(blocks))
    text = load(written)
    if not workers:
        assert text == b""
    for component, sums in expected.items():
        labels = {"component": component, "endpoint": "generate"}
        mean = sum(sums) / len(sums)
        assert math.isclose(of(text, "llm_load_avg", **labels), mean, abs_tol=1e-9)
        deviation = math.sqrt(sum((one - mean) ** 2 for one in sums) / len(sums))
        assert math.isclose(of(text, "llm_load_std", **labels), deviation, abs_tol=1e-9)
    merged = merge([*written, text])
    assert samples(merged).items() >= samples(text).items()


@given(st.dictionaries(st.from_regex(r"[A-Za-z_]\w*", fullmatch=True), st.floats(0, 1e300), max_size=4))
def test_a_family_can_be_parsed(values: dict[str, float]) -> None:
    text = family("up", "gauge", "It is up.", [({"service": name, "worker": "1"}, v) for name, v in values.items()])
    expected = {("up", frozenset({("service", name), ("worker", "1")})): value for name, value in values.items()}
    assert samples(text) == expected
    assert merge([text]) == text


def test_a_host_is_listed_once() -> None:
    found = json.loads(http_sd(["10.0.0.2:9091", "10.0.0.1:9091", "10.0.0.2:9091"]))
    assert found == [{"targets": ["10.0.0.1:9091", "10.0.0.2:9091"], "labels": {}}]


# -- labels


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ContextLengthError("too long"), "validation"),
        (ModelNotFoundError("no such model"), "not_found"),
        (OverloadedError("full"), "overload"),
        (NoInstancesError("no instance"), "unavailable"),
        (DeadlineError("late"), "response_timeout"),
        (EngineError("broken"), "internal"),
        (ValueError("a bug"), "internal"),
    ],
)
def test_an_error_has_a_type(error: Exception, expected: str) -> None:
    assert error_type(error) == expected


def test_workers_that_left_leave_the_routers_metrics() -> None:
    registry, router = CollectorRegistry(), KvRouter()
    metrics = RouterMetrics(router, registry)
    for worker in (0xA, 0xB):
        router.state.join(worker)
        router.state.mark_without_events(worker, "no KV events")
    for number in range(4):
        request = RouteRequest(str(number), 32, 32, b"")
        metrics.count_decision(request, router.route(request), 0.001)
    routed = {s.labels["worker"] for f in registry.collect() if f.name == "dynamo_router_requests" for s in f.samples}
    assert routed == {"a", "b"}
    router.state.leave(0xB)
    routed = {s.labels["worker"] for f in registry.collect() if f.name == "dynamo_router_requests" for s in f.samples}
    assert routed == {"a"}

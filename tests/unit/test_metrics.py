"""Metrics of several processes in one text, read back with Prometheus' own parser; and an engine's metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.http.exposition import merge
from dynamo.llm.engine import EngineInfo, EngineStats
from dynamo.llm.engine_metrics import EngineCollector, load_metrics
from dynamo.runtime.metrics import ProcessMetrics, label
from dynamo.sdk import dynamo_context, metrics_registry

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def families(text: bytes) -> list[Metric]:
    """The parser itself takes a family that comes twice; Prometheus does not."""
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
    found.belong("test", service, [("test", service)])
    return found


# -- merging

kinds = st.sampled_from([Counter, Gauge, Histogram])
values = st.dictionaries(st.text(max_size=8), st.floats(0, 1e9), max_size=4)
texts = st.lists(st.dictionaries(st.sampled_from(["a", "b_c", "a_b"]), st.tuples(st.text(), values), max_size=3))


@given(texts, st.data())
def test_every_sample_of_every_process_is_there_once(given: list[dict[str, Any]], data: st.DataObject) -> None:
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
        assert of(merged, "a_total", x='"\\\n# HELP b ,}{', service="Worker", worker_id=str(number)) == 1
    assert len([s for s in family.samples if s.name == "a_total"]) == 2


def test_the_first_text_stays_as_it_is() -> None:
    own = CollectorRegistry()
    Histogram("taken_seconds", "Time.", ["model"], registry=own, buckets=(1, 2)).labels("m").observe(1.5)
    other = process(255)
    Histogram("taken_seconds", "Time of another.", ["model"], registry=other.registry, buckets=(1,)).labels(
        "m"
    ).observe(1)
    merged = merge([generate_latest(own), other.text()])
    assert merged.startswith(generate_latest(own)[: generate_latest(own).index(b"# HELP taken_seconds_created")])
    assert of(merged, "taken_seconds_bucket", model="m", le="2.0") == 1
    assert of(merged, "taken_seconds_bucket", model="m", le="1.0", service="Worker", worker_id="ff") == 1
    types = {family.name: family.type for family in families(merged)}
    assert (types["taken_seconds"], types["taken_seconds_created"]) == ("histogram", "gauge")


def test_a_metric_of_another_type_is_left_out_and_a_comment_tells() -> None:
    first, second = process(1), process(2)
    Counter("a", "A.", registry=first.registry)
    Gauge("a_total", "A.", registry=second.registry)
    Info("b", "B.", registry=second.registry).info({"version": "1"})
    merged = merge([first.text(), second.text()])
    assert b"# samples of another process are left out, their type differs: a_total gauge\n" in merged
    assert [s.labels["worker_id"] for f in families(merged) for s in f.samples if s.name == "a_total"] == ["1"]
    assert of(merged, "b_info", version="1", service="Worker", worker_id="2") == 1


# -- what a process shows


def test_a_process_shows_its_memory_and_what_it_counts() -> None:
    found = process(0xABC, "Processor")
    Gauge("mine", "Mine.", ["service"], registry=found.registry).labels("billing").set(7)
    lent = CollectorRegistry()
    Counter("lent", "Of the HTTP server.", registry=lent)
    found.lend(lent)
    text, labels = found.text(), {"service": "Processor", "worker_id": "abc"}
    assert of(text, "process_resident_memory_bytes", **labels) > 1 << 20
    assert of(text, "process_cpu_seconds_total", **labels) > 0
    assert of(text, "process_open_fds", **labels) >= 3
    assert of(text, "process_start_time_seconds", **labels) > 1e9
    assert of(text, "mine", exported_service="billing", **labels) == 7
    assert b"lent_total" not in text


def test_labels_of_the_process_win() -> None:
    added = {"service": "Worker", "worker_id": "a"}
    assert label({"x": "1"}, added) == {"x": "1", **added}
    assert label({"worker_id": "a", "x": "1"}, added) == {"x": "1", **added}
    assert label({"worker_id": "b"}, added) == {"exported_worker_id": "b", **added}


def test_a_component_counts_with_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greeter:
        def __init__(self) -> None:
            self.greetings = Counter("greetings", "Greetings given.", registry=metrics_registry())

    for _ in range(2):  # as two tests would
        Greeter().greetings.inc()

    class Runtime:
        metrics = process(1)

    monkeypatch.setitem(dynamo_context, "runtime", Runtime)
    Greeter().greetings.inc(3)
    assert metrics_registry() is Runtime.metrics.registry
    assert of(Runtime.metrics.text(), "greetings_total", service="Worker", worker_id="1") == 3


# -- engines


class Engine:
    def __init__(self, *ranks: EngineStats) -> None:
        self.ranks = ranks

    def stats(self) -> Iterable[EngineStats]:
        return list(self.ranks)


def scraped(engine: Any, info: EngineInfo) -> Iterator[tuple[str, dict[str, str], float]]:
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, info, component="VllmWorker", endpoint="generate", worker_id="a"))
    for family in families(generate_latest(registry)):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert [labels.pop(name) for name in ("component", "endpoint", "worker_id")] == [
                "VllmWorker",
                "generate",
                "a",
            ]
            yield sample.name, labels, sample.value


def test_an_engine_is_read_when_it_is_scraped() -> None:
    engine: Any = Engine(EngineStats(0, 0, 0.0, 0, 0))
    info = EngineInfo(4096, 16, 200)
    assert load_metrics(engine, info)["gpu_prefix_cache_hit_rate"] == 0
    engine.ranks = (EngineStats(3, 2, 0.25, 1000, 400),)
    assert sorted(scraped(engine, info)) == [
        ("llm_kv_blocks_active", {}, 50),
        ("llm_kv_blocks_total", {}, 200),
        ("llm_prefix_cache_hits_total", {}, 400),
        ("llm_prefix_cache_queries_total", {}, 1000),
        ("llm_requests_active_slots", {}, 3),
        ("llm_requests_waiting", {}, 2),
    ]
    assert load_metrics(engine, info) == {
        "request_active_slots": 3,
        "num_requests_waiting": 2,
        "kv_active_blocks": 50,
        "kv_total_blocks": 200,
        "gpu_cache_usage_perc": 0.25,
        "gpu_prefix_cache_hit_rate": 0.4,
    }


def test_ranks_are_told_apart_and_summed() -> None:
    engine: Any = Engine(EngineStats(3, 0, 0.5, 100, 100), EngineStats(1, 4, 0.1, 300, 0))
    info = EngineInfo(4096, 16, 200, ranks=2)
    found = [(name, labels["dp_rank"], value) for name, labels, value in scraped(engine, info)]
    assert ("llm_kv_blocks_active", "0", 100) in found
    assert ("llm_kv_blocks_active", "1", 20) in found
    assert ("llm_requests_waiting", "1", 4) in found
    load = load_metrics(engine, info)
    assert (load["kv_active_blocks"], load["kv_total_blocks"], load["request_active_slots"]) == (120, 400, 4)
    assert math.isclose(load["gpu_cache_usage_perc"], 0.3)
    assert load["gpu_prefix_cache_hit_rate"] == 0.25

"""`/metrics` of a running graph: every process, in one valid text."""

from __future__ import annotations

import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.served import Served


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

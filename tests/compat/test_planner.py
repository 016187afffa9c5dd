"""Planners of 0.3: their names, their services, and a connector that adds and removes workers."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import httpx
import pytest

from dynamo.errors import ConfigError
from dynamo.planner import (
    KubernetesConnector,
    LoadPlannerDefaults,
    LocalConnector,
    PlannerConnector,
    SLAPlannerDefaults,
)
from dynamo.sdk.graph import load
from tests.cli.terminal import command
from tests.compat.test_hello import post
from tests.served import ROOT, Served, Start


def test_only_a_graph_that_links_it_has_a_planner() -> None:
    for name in ("agg", "agg_router", "disagg", "disagg_router"):
        assert "Planner" not in load(f"graphs.{name}:Frontend", ROOT).services
    graph = load("tests.graph.planned:Frontend", ROOT)
    assert list(graph.services) == ["PrefillWorker", "VllmWorker", "Processor", "Planner", "Frontend"]


def test_a_planner_and_a_prometheus_are_linked_below_the_shipped_frontend(tmp_path: Path) -> None:
    lines = [
        (ROOT / "graphs/agg.py").read_text(),
        "from dynamo.planner.planner_sla import Planner",
        "from dynamo.planner.prometheus import Prometheus",
        "Frontend.link(Planner)",
        "Frontend.link(Prometheus)",
    ]
    (tmp_path / "with_planner.py").write_text("\n".join(lines))
    graph = load("with_planner.py:Frontend", tmp_path)
    assert list(graph.services) == ["VllmWorker", "Processor", "Planner", "Prometheus", "Frontend"]


def test_the_defaults_of_0_3() -> None:
    load, sla = LoadPlannerDefaults, SLAPlannerDefaults
    assert (load.namespace, load.environment, load.no_operation, load.log_dir) == ("dynamo", "local", False, None)
    assert (load.adjustment_interval, load.metric_pulling_interval) == (180, 10)
    assert (load.max_gpu_budget, load.min_endpoint) == (8, 1)
    assert (load.decode_engine_num_gpu, load.prefill_engine_num_gpu) == (1, 1)
    assert (load.decode_kv_scale_up_threshold, load.decode_kv_scale_down_threshold) == (0.9, 0.5)
    assert (load.prefill_queue_scale_up_threshold, load.prefill_queue_scale_down_threshold) == (5.0, 0.2)
    assert (sla.prometheus_endpoint, sla.profile_results_dir) == ("http://localhost:9090", "profiling_results")
    assert (sla.isl, sla.osl, sla.ttft, sla.itl) == (3000, 150, 0.5, 0.05)
    assert (sla.load_predictor, sla.load_prediction_window_size, sla.backend) == ("arima", 50, "vllm_v0")


@pytest.mark.parametrize(
    "path",
    [
        "dynamo.planner:LocalConnector",
        "dynamo.planner:PlannerDefaults",
        "dynamo.planner.defaults:BasePlannerDefaults",
        "dynamo.planner.defaults:PlannerDefaults",
        "dynamo.planner.defaults:WORKER_COMPONENT_NAMES",
        "dynamo.planner.kubernetes_connector:KubernetesConnector",
        "dynamo.planner.local_connector:LocalConnector",
        "dynamo.planner.planner_connector:PlannerConnector",
        "dynamo.planner.planner_sla:Planner",
        "dynamo.planner.prometheus:Prometheus",
        "components.planner_service:Planner",
    ],
)
def test_the_import_paths_of_0_3(path: str) -> None:
    module, _, name = path.partition(":")
    assert hasattr(importlib.import_module(module), name)


def test_a_name_that_never_was() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Absent'"):
        from dynamo.planner import Absent  # type: ignore[attr-defined]  # noqa: F401


async def test_kubernetes_cannot_scale_yet() -> None:
    connector = KubernetesConnector("dynamo")
    assert isinstance(connector, PlannerConnector)
    with pytest.raises(ConfigError, match="cannot add a VllmWorker: Kubernetes is not supported yet"):
        await connector.add_component("VllmWorker")


async def test_without_a_supervisor_nothing_is_added(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DYNAMO_RUN_DIR", str(tmp_path))
    assert await LocalConnector("dynamo", None).add_component("VllmWorker") is False
    assert "cannot add VllmWorker: no answer from the supervisor" in caplog.text


@pytest.fixture(scope="module")
def planner_03(era: Start) -> Served:
    return era("planner_03", "--Planner.environment=local").ready()


def answer(served: Served, text: str) -> str:
    found: httpx.Response = post(served, "generate", text=text)
    assert found.status_code == 200, found.text
    return found.text


def test_a_connector_adds_and_removes_workers(planner_03: Served) -> None:
    assert answer(planner_03, "add Echo") == "True"
    planner_03.wait_for("Echo:2 ready", 10)
    assert answer(planner_03, "remove Echo") == "True"
    planner_03.wait_for("Echo:2 removed", 10)
    assert answer(planner_03, "remove Echo") == "False"  # the last one
    assert answer(planner_03, "add Absent") == "False"
    planner_03.wait_for("cannot remove Echo: Echo stays: no other worker of Echo is ready", 10)
    planner_03.wait_for("cannot add Absent: Absent: no such service here", 10)


def test_a_planner_whose_loop_fails_is_restarted(planner_03: Served) -> None:
    shown = len(planner_03.output)
    assert answer(planner_03, "fail now") == "True"
    planner_03.wait_for("Planner exited (1): RuntimeError('no metrics'); restarting in ", 20, after=shown)
    planner_03.wait_for("Planner ready again", 20, after=shown)


def test_a_planner_that_dies_is_restarted(planner_03: Served) -> None:
    shown = len(planner_03.output)
    os.kill(planner_03.pids("--service-name Planner")[0], signal.SIGKILL)
    planner_03.wait_for("Planner ready again", 20, after=shown)
    assert answer(planner_03, "add Echo") == "True"
    assert planner_03.stop(signal.SIGINT) == 0


def test_a_planner_that_fails_at_once_ends_the_start(era: Start) -> None:
    served = era("planner_03", "--Planner.adjustment-interval=0")
    assert served.process.wait(30) == 1
    assert "Planner could not start: RuntimeError: no metrics" in served.output


def test_the_sla_planner_plans_by_the_load_rule(serve_graph: Start) -> None:
    config = ["-f", "configs/disagg_mock.yaml", "--VllmWorker.ServiceArgs.workers=1"]
    planner = ["--Planner.ttft=0.3", "--Planner.adjustment-interval=1", "--Planner.backend=vllm_v0"]
    prometheus = ["--Prometheus.global.scrape_interval=5s", "--Prometheus.scrape_configs=[]"]
    served = serve_graph(
        *config, *planner, *prometheus, "--enable-local-planner", graph="tests/compat/graphs/sla_planner_03.py:Frontend"
    )
    served.ready()
    assert "--enable-local-planner has no effect: a Planner that the graph links plans in any case" in served.output
    assert "planning by the load rule with its default thresholds on prefill queue and KV usage" in served.output
    served.wait_for("PrefillWorker:2 removed in", 30)
    served.wait_for(r"no Prometheus server is started; metrics for one to scrape: http://", 5)
    assert "PrefillWorker:2" not in command("scale", **served.servers).stdout

"""The process plan and the sources of values, which a dry run prints on standard error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dynamo.launcher.plan import plan
from dynamo.sdk.graph import load

ROOT = Path(__file__).parents[2]


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dynamo", "serve", "graphs.agg:Frontend", *arguments, "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True)


def explained(*arguments: str) -> dict[str, Any]:
    done = dry_run("-f", "configs/agg_mock.yaml", "--explain", "json", *arguments)
    assert done.stdout.startswith("Service Configuration:\n{")
    found: dict[str, Any] = json.loads(done.stderr)
    return found


def test_sources_of_values_and_defaults() -> None:
    values = {row["key"]: (row["value"], row["source"]) for row in explained("--Processor.router=random")["values"]}
    assert values["Processor.router"] == ("random", "--Processor.router")
    assert values["VllmWorker.engine"] == ("mock", "configs/agg_mock.yaml:26")
    assert values["Frontend.host"] == ("127.0.0.1", "default")
    assert values["VllmWorker.block-size"][0] == 32


def test_the_plan_lists_every_process_with_its_environment() -> None:
    found = explained("--VllmWorker.ServiceArgs.workers=2", "--VllmWorker.ServiceArgs.envs.NOTE=7")["plan"]
    assert [process["name"] for process in found] == ["VllmWorker:1", "VllmWorker:2", "Processor", "Frontend"]
    assert found[1]["command"].endswith("--service-name VllmWorker --worker-id 2 --workers 2")
    assert found[0]["env"] == {"NOTE": "7"}
    assert all(process["gpus"] == [] for process in found)


def test_too_few_gpus_are_reported_beside_the_configuration() -> None:
    found = explained("--VllmWorker.ServiceArgs.resources.gpu=99")
    assert "VllmWorker needs 99 GPUs" in found["plan_error"]
    assert "plan" not in found


def test_the_table_is_readable() -> None:
    lines = dry_run("-f", "configs/agg_mock.yaml").stderr.splitlines()
    assert lines[0] == "Processes:"
    assert lines[1].split()[:3] == ["VllmWorker", "no", "GPU"]
    assert "Where each value comes from:" in lines


def test_gpus_are_assigned_in_order_and_shared_by_fractions() -> None:
    graph = load("graphs.agg:Frontend", ROOT)

    def gpus(visible: list[str], **arguments: Any) -> list[str]:
        services = {"VllmWorker": {"ServiceArgs": arguments}}
        found = plan(graph, services, working_dir=ROOT, visible_gpus=visible)
        return [process.env["CUDA_VISIBLE_DEVICES"] for process in found if process.service == "VllmWorker"]

    assert gpus(["0", "1", "2", "3"], workers=2, resources={"gpu": 2}) == ["0,1", "2,3"]
    assert gpus(["5", "7"], workers=2, resources={"gpu": 1}) == ["5", "7"]
    assert gpus(["3", "4"], workers=3, resources={"gpu": 0.5}) == ["3", "3", "4"]
    shared = {"VllmWorker": {"ServiceArgs": {"workers": 2, "resources": {"gpu": 0.5}}}}
    found = plan(graph, shared, working_dir=ROOT, visible_gpus=["0"])
    assert [process.env["DYNAMO_GPU_SHARE"] for process in found if process.service == "VllmWorker"] == ["0.5", "0.5"]
    assert gpus([], workers=2, resources={"gpu": 0}) == ["", ""]

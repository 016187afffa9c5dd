"""`dynamo serve --depends` and `--target`: services that run elsewhere."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cli.conftest import Graph
from tests.cli.terminal import COMMAND, ROOT, command, environment
from tests.ports import free_port

AGG = ("serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--depends", "VllmWorker"], 1, "Invalid format for --depends option. Use format 'name=value'"),
        (["--depends", "=x"], 1, "Invalid format for --depends option. Use format 'name=value'"),
        (["--depends", "Wroker=x"], 1, "graphs.agg:Frontend has no service 'Wroker'"),
        (["--depends", "VllmWorker=x", "--infra", "embedded"], 1, "--depends needs the NATS and etcd of the services"),
        (
            ["--depends", "VllmWorker=x", "--depends", "Processor=x", "--depends", "Frontend=x"],
            1,
            "--depends leaves no service to start",
        ),
        (["--target", "kubernetes"], 2, "Invalid value for '--target': 'kubernetes' is not 'dynamo'."),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments, code, message):
    result = command(*AGG, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")


def planned(stderr: str) -> list[str]:
    """Return the names of the processes that a dry run lists."""
    return [line.split()[0] for line in stderr.partition("Where each value comes from:")[0].splitlines()[1:]]


def test_dry_run_lists_the_processes_that_would_start():
    whole = command(*AGG, "--dry-run", "--target", "dynamo")
    part = command(*AGG, "--dry-run", "--depends", "VllmWorker=elsewhere")
    assert part.stdout == whole.stdout  # the configuration of all services, also of those elsewhere
    assert planned(part.stderr) == ["Processor", "Frontend"]
    least = command(*AGG, "--dry-run", DYNAMO_SERVE_DEPENDS="VllmWorker=a Processor=b")
    assert planned(least.stderr) == ["Frontend"]


def test_a_second_frontend_for_a_running_graph(graph: Graph, tmp_path: Path):
    port = free_port()
    elsewhere = ("--depends", "VllmWorker=elsewhere", "--depends", "Processor=elsewhere")
    log = tmp_path / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, *AGG, *elsewhere, "--port", str(port)],
            cwd=ROOT,
            env=environment(TMPDIR=graph.env["TMPDIR"], **graph.servers),
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 30
        while "\nready in" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert "starting 1 process: Frontend\n" in log.read_text()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as response:
            assert "dynamo-tiny" in {model["id"] for model in json.load(response)["data"]}
        lines = command("status", **graph.env).stdout.splitlines()
        assert [line.split("  ")[1] for line in lines[:2]] == [graph.url, f"http://127.0.0.1:{port}"]
        assert lines[2].startswith("etcd ")
    finally:
        process.terminate()
        process.wait(40)
    assert process.returncode == 0

"""`dynamo scale`: changes, refusals and the list of workers, on a graph with one mock worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Graph
from tests.cli.terminal import COMMAND, ROOT, command, environment
from tests.cli.test_completion import completed


def scale(graph: Graph, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command("scale", *arguments, **graph.env)


def workers(graph: Graph, service: str = "VllmWorker") -> list[dict[str, Any]]:
    """Return a service's workers as `dynamo status` shows them."""
    result = command("status", "--json", **graph.env)
    services = json.loads(result.stdout)["deployments"][0]["graphs"][0]["services"]
    found: list[dict[str, Any]] = next(s["workers"] for s in services if s["service"] == service)
    return found


def names(graph: Graph) -> list[str]:
    return [worker["name"] for worker in workers(graph)]


def test_up_and_down(graph: Graph) -> None:
    result = scale(graph, "VllmWorker=3")
    assert (result.returncode, result.stdout) == (0, "VllmWorker: 1 -> 3 workers\n")
    assert all(line.startswith(("VllmWorker:2: ", "VllmWorker:3: ")) for line in result.stderr.splitlines())
    assert names(graph) == ["VllmWorker", "VllmWorker:2", "VllmWorker:3"]
    shown = command("status", **graph.env).stdout
    assert "\ndynamo.VllmWorker: 3 workers, 1 at the start\n" in shown
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith("dynamo-tiny ")] == ["3"]
    result = scale(graph, "VllmWorker=3")
    assert (result.returncode, result.stdout) == (0, "VllmWorker: stays 3 workers\n")
    result = scale(graph, "--remove", "VllmWorker:2")
    assert (result.returncode, result.stdout) == (0, "VllmWorker:2: removed\n")
    result = scale(graph, "VllmWorker=+1")  # the number that is free
    assert result.stdout == "VllmWorker: 2 -> 3 workers\n"
    assert names(graph) == ["VllmWorker", "VllmWorker:3", "VllmWorker:2"]
    result = scale(graph, "VllmWorker=-1")  # the youngest
    assert result.stdout == "VllmWorker: 3 -> 2 workers\n"
    assert names(graph) == ["VllmWorker", "VllmWorker:3"]
    assert scale(graph, "VllmWorker=1", "Processor=1").stdout == (
        "VllmWorker: 2 -> 1 worker\nProcessor: stays 1 worker\n"
    )
    assert "at the start" not in command("status", **graph.env).stdout


def test_an_added_worker_that_dies_is_restarted(graph: Graph) -> None:
    assert scale(graph, "VllmWorker=2").returncode == 0
    added = workers(graph)[1]
    os.kill(added["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (found := workers(graph)[1])["state"] != "ready" or not found["restarts"]:
        assert time.monotonic() < deadline, found
    assert found["pid"] != added["pid"]
    assert scale(graph, "VllmWorker=1").returncode == 0


def test_the_list_of_workers(graph: Graph) -> None:
    result = scale(graph)
    assert result.returncode == 0
    sockets = list(Path(graph.env["TMPDIR"]).glob("dynamo-*/scaling"))
    assert [path.stat().st_mode & 0o777 for path in sockets] == [0o600]
    first, head, *rows = result.stdout.splitlines()
    assert first.startswith("graphs.agg:Frontend  pid ")
    assert head.split() == ["SERVICE", "WORKER", "STATE", "GPUS", "PID", "RESTARTS"]
    assert [row.split()[:3] for row in rows] == [
        ["dynamo.VllmWorker", "VllmWorker", "ready"],
        ["dynamo.Processor", "Processor", "ready"],
        ["dynamo.Frontend", "Frontend", "ready"],
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["VllmWorkr=2"], 1, "VllmWorkr: no such service runs here", "did you mean VllmWorker? services: "),
        (["VllmWorker=0"], 1, "VllmWorker: one worker has to stay, of 1", "Ctrl-C stops the whole graph"),
        (["VllmWorker=-1"], 1, "VllmWorker: one worker has to stay, of 1", "Ctrl-C stops the whole graph"),
        (["Frontend=2"], 1, "Frontend listens on a port that it does not share", "start the graph with --Frontend."),
        (["--remove", "VllmWorker"], 1, "VllmWorker stays: no other worker of VllmWorker is ready", "Ctrl-C stops"),
        (["--remove", "VllmWorker:7"], 1, "VllmWorker has no worker 'VllmWorker:7'", "did you mean VllmWorker?"),
        (["--pid", "1"], 1, "no `dynamo serve` has the process id 1", "see `dynamo status`"),
        (
            ["VllmWorker"],
            2,
            "'VllmWorker' is not SERVICE=N, SERVICE=+N or SERVICE=-N, such as Vll",
            "run `dynamo scale",
        ),
        (["VllmWorker=two"], 2, "'VllmWorker=two' is not SERVICE=N, SERVICE=+N or", "run `dynamo scale"),
        (["VllmWorker=2", "VllmWorker=3"], 2, "VllmWorker is given twice", "run `dynamo scale --help`"),
    ],
)
def test_what_makes_no_sense_changes_nothing(
    graph: Graph, arguments: list[str], code: int, error: str, hint: str
) -> None:
    result = scale(graph, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"error: {error}")
    assert lines[1].startswith(f"hint: {hint}")
    assert len(lines) == 2
    assert names(graph) == ["VllmWorker"]


def test_one_change_that_makes_no_sense_stops_all(graph: Graph) -> None:
    result = scale(graph, "VllmWorker=2", "Absent=2")
    assert result.returncode == 1
    assert names(graph) == ["VllmWorker"]


def test_without_a_graph(nothing_runs: dict[str, str]) -> None:
    result = command("scale", "VllmWorker=2", **nothing_runs)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no graph runs on this machine\nhint: ")


def test_ctrl_c_does_not_undo(graph: Graph) -> None:
    process = subprocess.Popen([*COMMAND, "scale", "VllmWorker=2"], cwd=ROOT, env=environment(**graph.env))
    deadline = time.monotonic() + 20
    while len(workers(graph)) < 2:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (130, 0, -signal.SIGINT)  # the last two: the worker was ready before the signal
    while workers(graph)[1]["state"] != "ready":
        assert time.monotonic() < deadline
    assert scale(graph, "VllmWorker=1").returncode == 0


def test_completion_of_services(graph: Graph) -> None:
    assert completed("dynamo", "scale", "Vllm", **graph.env) == {"VllmWorker="}

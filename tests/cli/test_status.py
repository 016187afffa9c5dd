"""`dynamo status`: graphs of this machine and of an etcd, in tables and as JSON."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dynamo.cli.deployments import Deployment, EndpointStats, Snapshot, take_snapshot
from dynamo.cli.status import render
from dynamo.launcher.embedded_servers import Infra
from dynamo.launcher.run_dir import FILE, announce, running
from dynamo.rpc.messages import Instance
from dynamo.rpc.runtime import Runtime
from tests.cli.conftest import Graph
from tests.cli.terminal import COMMAND, ROOT, command, environment


def cells(output: str, head: str) -> list[list[str]]:
    """Return the rows of the table whose head begins with that word, cut at the columns of the head."""
    lines = output.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(f"{head} "))
    starts = [i for i, c in enumerate(lines[at]) if c != " " and (i == 0 or lines[at][i - 2 : i] == "  ")]
    rows = []
    for line in lines[at + 1 :]:
        if not line:
            break
        rows.append([line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)])
    return rows


def test_tables_of_a_running_graph(graph: Graph):
    for _ in range(2):
        assert command("run", "--url", graph.url, "--max-tokens", "2", "hi").returncode == 0
    result = command("status", **graph.env)
    assert (result.returncode, result.stderr) == (0, "")
    first, second = result.stdout.splitlines()[:2]
    assert first.startswith(f"graphs.agg:Frontend  {graph.url}  pid ")
    assert second == " ".join(
        ["etcd", graph.servers["ETCD_ENDPOINTS"][7:] + ",", "nats", graph.servers["NATS_SERVER"][7:]]
    )
    rows = {(row[0], row[2]): row for row in cells(result.stdout, "SERVICE")}
    assert set(rows) >= {
        ("dynamo.Processor", "chat/completions"),
        ("dynamo.Processor", "completions"),
        ("dynamo.VllmWorker", "generate"),
    }
    for service in (("dynamo.Processor", "chat/completions"), ("dynamo.VllmWorker", "generate")):
        _, instance, _, address, host, since, requests, in_flight, errors, average = rows[service][:10]
        assert int(instance, 16) > 0
        assert address.startswith("127.0.0.1:")
        assert host == "here"
        assert since.endswith((" s", " min"))
        assert int(requests) >= 2
        assert in_flight == "0"
        assert int(errors) >= 0
        assert average.endswith(" ms")
    models = cells(result.stdout, "MODEL")
    assert ["dynamo-tiny", "chat,completion", "4096", "mock", "dynamo-tiny", "dynamo.VllmWorker", "1"] in models


def test_json_output(graph: Graph):
    result = command("status", "--json", **graph.env)
    assert result.returncode == 0
    (deployment,) = json.loads(result.stdout)["deployments"]
    assert [g["graph"] for g in deployment["graphs"]] == ["graphs.agg:Frontend"]
    assert {i["service"] for i in deployment["instances"]} == {"Processor", "VllmWorker"}
    assert all(i["since"] <= time.time() and i["errors"] >= 0 for i in deployment["instances"])
    assert "dynamo-tiny" in {m["name"] for m in deployment["models"]}


def test_etcd_endpoints_name_the_deployment(graph: Graph, nothing_runs: dict[str, str]):
    """As seen from another machine, where there is no run directory."""
    result = command("status", **(nothing_runs | graph.servers))
    assert result.returncode == 0
    assert "pid" not in result.stdout
    assert len(cells(result.stdout, "SERVICE")) >= 3
    without_nats = command("status", **(nothing_runs | graph.servers | {"NATS_SERVER": "nats://127.0.0.1:9"}))
    assert without_nats.returncode == 0
    assert "error: cannot connect to NATS" in without_nats.stdout
    assert {tuple(row[5:]) for row in cells(without_nats.stdout, "SERVICE")} == {("",) * 5}


def test_nothing_runs(nothing_runs: dict[str, str]):
    result = command("status", **nothing_runs)
    assert (result.returncode, result.stdout) == (1, "")
    error, hint = result.stderr.splitlines()
    assert error == "error: nothing runs"
    assert hint.startswith("hint: start a graph with `dynamo serve`")


def test_watch_refreshes_until_ctrl_c(graph: Graph):
    process = subprocess.Popen(
        [*COMMAND, "status", "--watch", "--json"],
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED="1", **graph.env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    looks = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert looks[0]["deployments"][0]["instances"]
    assert [g["pid"] for g in looks[0]["deployments"][0]["graphs"]] == [
        g["pid"] for g in looks[1]["deployments"][0]["graphs"]
    ]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


# -- announcements


def test_only_running_graphs_are_found(tmp_path: Path):
    env = {"NATS_SERVER": "nats://127.0.0.1:1", "ETCD_ENDPOINTS": "http://127.0.0.1:9"}
    with ExitStack() as opened:
        for number, address in enumerate([("0.0.0.0", 8000), ("::1", 8001), None]):
            (tmp_path / f"dynamo-{number}").mkdir()
            opened.enter_context(announce(tmp_path / f"dynamo-{number}", f"g{number}:F", address, env))
        (tmp_path / "dynamo-other").mkdir()
        (tmp_path / "dynamo-other" / FILE).write_text("{}")
        (tmp_path / "dynamo-empty").mkdir()
        (tmp_path / "dynamo-older").mkdir()
        older = opened.enter_context((tmp_path / "dynamo-older" / FILE).open("w"))
        fcntl.flock(older, fcntl.LOCK_EX)
        json.dump({"graph": "old:F", "pid": 1, "a field of another version": 1}, older)
        older.flush()
        old, *found = running(tmp_path)
        assert (old.graph, old.url, old.env) == ("old:F", "", {})
        assert [(g.graph, g.url) for g in found] == [
            ("g0:F", "http://127.0.0.1:8000"),
            ("g1:F", "http://[::1]:8001"),
            ("g2:F", ""),
        ]
        assert found[0].env == env
        result = command("status", TMPDIR=str(tmp_path))  # found, although its etcd is not reachable
        assert result.returncode == 0
        assert "old:F" in result.stdout
        assert "g0:F" in result.stdout
        assert "g1:F" in result.stdout
        assert "error: etcd does not answer at http://127.0.0.1:9" in result.stdout
    assert running(tmp_path) == []  # the files exist, but no process holds their lock


def test_several_deployments_are_shown_in_turn(graph: Graph, tmp_path: Path):
    (running,) = Path(graph.env["TMPDIR"]).glob("dynamo-*")
    link = tmp_path / running.name
    link.symlink_to(running)
    other = tmp_path / "dynamo-other"
    other.mkdir()
    env = {"NATS_SERVER": "nats://127.0.0.1:1", "ETCD_ENDPOINTS": "http://127.0.0.1:9"}
    with announce(other, "mine:Entry", None, env):
        result = command("status", TMPDIR=str(tmp_path))
        first, second = result.stdout.split("\n\nmine:Entry")
        assert first.startswith("graphs.agg:Frontend")
        assert "error: etcd does not answer" in second
        refused = command("llmctl", "http", "list", TMPDIR=str(tmp_path))
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: several graphs run here: graphs.agg:Frontend (")


@pytest.mark.parametrize(("arguments", "code"), [(["--nonsense"], 2), (["stray"], 2)])
def test_a_bad_flag(arguments, code):
    result = command("status", *arguments)
    assert result.returncode == code
    assert len(result.stderr.splitlines()) == 2


# -- statistics of KV caches


async def test_kv_usage_and_prefix_hit_rate_are_shown(private_infra: Infra):
    servers = {"nats_url": private_infra.nats_url, "etcd_endpoints": private_infra.etcd_endpoints}
    runtime = Runtime(**servers)
    stats = {"gpu_cache_usage_perc": 0.254, "gpu_prefix_cache_hit_rate": 1, "kv_total_blocks": 100}
    await runtime.serve("dynamo", "Worker", "generate", str, str, lambda: stats)
    await runtime.serve("dynamo", "Worker", "other", str, str, lambda: {"gpu_cache_usage_perc": "much"})
    snapshot = await take_snapshot(Deployment(**servers))
    await runtime.close()
    rows = {row[2]: row for row in cells(render([snapshot]), "SERVICE")}
    assert rows["generate"][10:] == ["25%", "100%"]
    assert rows["other"][10:] == ["", ""]
    found = {instance.endpoint: stats for instance, stats in snapshot.instances}
    assert (found["generate"].kv_usage, found["generate"].prefix_hit_rate) == (0.254, 1.0)


def test_no_cache_columns_if_no_worker_reports_them():
    instance = Instance("dynamo", "Worker", "generate", 10, {"nats_tcp": "dynamo_worker.generate-a"}, {})
    snapshot = Snapshot(Deployment("http://etcd", "nats://nats"), [(instance, EndpointStats(1, 0, 0, 0.5, 0.0))])
    head = next(line for line in render([snapshot]).splitlines() if line.startswith("SERVICE "))
    assert head.split()[-1] == "AVERAGE"


def test_no_snapshots_render_as_empty_text():
    assert render([]) == ""

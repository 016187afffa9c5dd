"""`dynamo serve --service-name`: some services of a graph, beside others that run elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.terminal import COMMAND, ROOT, command, environment
from tests.cli.test_depends import planned
from tests.ports import free_port

DISAGG = ("serve", "graphs.disagg:Frontend", "-f", "configs/disagg_mock.yaml")
AGG = ("serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml")
WORKER = ("--service-name", "VllmWorker")


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["--service-name", "VlmWorker"], 1, "graphs.disagg:Frontend has no service 'VlmWorker'", "did you mean Vllm"),
        (
            [*WORKER, "--service-name", "Frontent"],
            1,
            "graphs.disagg:Frontend has no service 'Frontent'",
            "did you mean F",
        ),
        (
            [*WORKER, "--depends", "VllmWorker=x"],
            1,
            "graphs.disagg:Frontend has no service 'VllmWorker'",
            "services of",
        ),
        (
            [*WORKER, "--infra", "embedded"],
            1,
            "--service-name needs the NATS and etcd of the services",
            "NATS_SERVER and",
        ),
        ([*WORKER, "--VllmWorker.ServiceArgs.resources.gpu=1"], 1, "VllmWorker needs 1 GPU, 0 of 0", ""),
        (["--supervise"], 2, "--supervise needs --service-name", ""),
        (
            [*WORKER, "--service-name", "Processor", "--system-app-port", "1"],
            2,
            "--system-app-port takes one --service-name",
            "",
        ),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments: list[str], code: int, message: str, hint: str) -> None:
    result = command(*DISAGG, *arguments, CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert hint in result.stderr


@pytest.mark.parametrize("many", [(), ("--VllmWorker.ServiceArgs.workers=2",)])
def test_without_nats_and_etcd_both_variables_are_named(many: tuple[str, ...]) -> None:
    port = free_port()
    result = command(*AGG, *WORKER, *many, NATS_SERVER=f"nats://127.0.0.1:{port}")
    assert result.returncode == 1
    assert result.stderr.splitlines()[:2] == [
        f"error: nats does not answer at 127.0.0.1:{port} (NATS_SERVER)",
        "hint: start it, or set NATS_SERVER and ETCD_ENDPOINTS to where they run",
    ]


@pytest.mark.parametrize("many", [(), ("--VllmWorker.ServiceArgs.workers=2",)])
def test_the_hint_is_a_field_of_json_lines(many: tuple[str, ...]) -> None:
    port = free_port()
    result = command(*AGG, *WORKER, *many, NATS_SERVER=f"nats://127.0.0.1:{port}", DYN_LOGGING_JSONL="true")
    assert result.returncode == 1
    failed, *rest = [json.loads(line) for line in result.stderr.splitlines()]
    assert failed["level"] == "ERROR"
    assert failed["message"].endswith(f"nats does not answer at 127.0.0.1:{port} (NATS_SERVER)")
    assert failed["hint"] == "start it, or set NATS_SERVER and ETCD_ENDPOINTS to where they run"
    assert [line["level"] for line in rest] == (["INFO"] if many else [])  # the directory of the logs


def test_dry_run_lists_the_processes_that_would_start_here() -> None:
    whole = command(*DISAGG, "--dry-run")
    part = command(*DISAGG, *WORKER, "--service-name", "PrefillWorker", "--dry-run")
    assert part.stdout == whole.stdout
    two = ["PrefillWorker:1", "PrefillWorker:2", "VllmWorker:1", "VllmWorker:2"]
    assert sorted(planned(part.stderr)) == two
    by_variable = command(*DISAGG, "--dry-run", DYNAMO_SERVICE_NAME="VllmWorker")
    assert planned(by_variable.stderr) == ["VllmWorker:1", "VllmWorker:2"]


def test_gpus_of_the_plan() -> None:
    given = ("--VllmWorker.ServiceArgs.resources.gpu=1", "--VllmWorker.ServiceArgs.workers=2")
    told = command(*AGG, *WORKER, *given, "--dry-run", CUDA_VISIBLE_DEVICES="5,7").stderr
    assert re.search(r"VllmWorker:1 +GPU 5 ", told)
    assert re.search(r"VllmWorker:2 +GPU 7 ", told)


SHOW = """
import os
from dynamo.sdk import async_on_start, service

@service(resources={"gpu": 2})
class Show:
    @async_on_start
    def show(self):
        print("sees", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
        os._exit(7)
"""


def test_a_foreground_process_gets_the_gpus_of_the_plan(nats_server: str, etcd_server: str, tmp_path: Path) -> None:
    """Its exit code becomes the exit code of the command."""
    (tmp_path / "show.py").write_text(SHOW)
    env = {"NATS_SERVER": nats_server, "ETCD_ENDPOINTS": etcd_server, "CUDA_VISIBLE_DEVICES": "5,7,9"}
    result = command("serve", "show.py:Show", "--service-name", "Show", "--metrics-port", "0", cwd=tmp_path, **env)
    assert "sees 5,7\n" in result.stdout
    assert result.returncode == 7


class Joined:
    """Run a command that joins a graph on the servers of the tests, in a namespace of its own."""

    def __init__(self, log: Path, nats: str, etcd: str, *arguments: str, **env: str) -> None:
        self.log = log
        apart = ("--VllmWorker.ServiceArgs.dynamo.namespace=joined", "--metrics-port", "0")
        env = environment(NATS_SERVER=nats, ETCD_ENDPOINTS=etcd, TMPDIR=str(log.parent), **env)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, *AGG, *WORKER, *apart, *arguments], cwd=ROOT, env=env, stdout=output, stderr=output
            )

    def wait_for(self, text: str, timeout_s: float = 60) -> str:
        deadline = time.monotonic() + timeout_s
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return self.log.read_text()


def test_a_single_process_runs_in_the_foreground(nats_server: str, etcd_server: str, tmp_path: Path) -> None:
    joined = Joined(tmp_path / "output", nats_server, etcd_server)
    output = joined.wait_for(f"joined joined/VllmWorker of the graph at {nats_server}")
    first, *_, ready = output.splitlines()
    assert first.startswith("joining the graph at nats 127.0.0.1:")
    assert re.match(r"ready in \S+ s: joined ", ready)
    assert not Path(f"/proc/{joined.process.pid}/task/{joined.process.pid}/children").read_text()
    joined.process.send_signal(signal.SIGTERM)
    assert joined.process.wait(30) == 0


def test_a_foreground_process_logs_json(nats_server: str, etcd_server: str, tmp_path: Path) -> None:
    port = str(free_port())
    variables = {"DYN_LOGGING_JSONL": "true", "DYN_LOG": "debug"}
    joined = Joined(tmp_path / "output", nats_server, etcd_server, "--metrics-port", port, **variables)
    joined.wait_for("joined joined/VllmWorker of the graph at")
    joined.process.send_signal(signal.SIGTERM)
    assert joined.process.wait(30) == 0
    lines = [json.loads(line) for line in (tmp_path / "output").read_text().splitlines()]
    assert all({"time", "level", "target", "message"} <= line.keys() for line in lines)
    told = [line["message"] for line in lines if line["service"] == "serve"]
    assert [text[:15] for text in told[:2]] == ["joining the gra", "metrics: http:/"]
    assert re.fullmatch(r"ready in \S+ s: joined joined/VllmWorker of .*", told[2])
    assert "VllmWorker" in {line["service"] for line in lines}


def test_exit_code_of_a_foreground_process(nats_server: str, etcd_server: str, tmp_path: Path) -> None:
    joined = Joined(tmp_path / "output", nats_server, etcd_server, "--VllmWorker.block-size=0")
    assert joined.process.wait(60) == 1
    assert "block-size" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("arguments", [("--supervise",), ("--VllmWorker.ServiceArgs.workers=2",)])
def test_supervised_processes_are_restarted(
    arguments: tuple[str, ...], nats_server: str, etcd_server: str, tmp_path: Path
) -> None:
    joined = Joined(tmp_path / "output", nats_server, etcd_server, *arguments)
    joined.wait_for(f"s: joined joined/VllmWorker of the graph at {nats_server}")
    from dynamo.launcher.guard import descendants

    served = [pid for pid in descendants(joined.process.pid) if b"worker.process" in cmdline(pid)]
    assert len(served) == (1 if arguments == ("--supervise",) else 2)
    os.kill(served[0], signal.SIGKILL)
    joined.wait_for("ready again")
    joined.process.send_signal(signal.SIGTERM)
    assert joined.process.wait(40) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in served)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

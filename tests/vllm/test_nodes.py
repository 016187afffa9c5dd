"""One vLLM engine over two nodes on this host: tensor parallel 2, with one CPU worker on each node."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dynamo.launcher.guard import descendants
from tests.cli.terminal import COMMAND, ROOT, command
from tests.cli.terminal import environment as clean
from tests.ports import free_port
from tests.served import Served, Start

START_S = 240
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]  # five starts of vLLM
TINY = ("-f", "configs/agg_tiny.yaml")


@pytest.fixture
def split() -> tuple[str, ...]:
    keys = {"tensor-parallel-size": 2, "nnodes": 2, "master-addr": "127.0.0.1", "master-port": free_port()}
    return tuple(f"--VllmWorker.{key}={value}" for key, value in keys.items())


class Follower:
    def __init__(self, log: Path, arguments: tuple[str, ...], env: dict[str, str]) -> None:
        self.log = log
        joining = ("--service-name", "VllmWorker", "--supervise", "--VllmWorker.node-rank=1")
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", "graphs.agg:Frontend", *TINY, *arguments, *joining],
                cwd=ROOT, env=clean(TMPDIR=str(log.parent), **env), stdout=output, stderr=output,
            )  # fmt: skip

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + START_S
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def worker(self) -> int:
        """Return the pid of its service process."""
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(self.process.pid)}
        return next(pid for pid, line in commands.items() if b"dynamo.worker.process" in line)


@pytest.fixture
def leader(serve_graph: Start, split: tuple[str, ...]) -> Served:
    return serve_graph(*TINY, *split)


@pytest.fixture
def follower(leader: Served, split: tuple[str, ...], tmp_path: Path) -> Iterator[Follower]:
    leader.wait_for("starting 3 processes", 60)
    found = Follower(tmp_path / "output", split, leader.servers)
    yield found
    found.process.send_signal(signal.SIGTERM)
    assert found.process.wait(60) == 0


def answer(served: Served) -> str:
    question = {"role": "user", "content": "What is Dynamo?"}
    body = {"model": "dynamo-tiny", "messages": [question], "max_tokens": 16, "temperature": 0}
    found = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=120)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["message"]["content"])


def test_engine_over_two_nodes_answers_and_recovers_from_the_loss_of_either(leader: Served, follower: Follower) -> None:
    leader.ready(START_S)
    follower.wait_for("no endpoint here")
    assert re.search(r"VllmWorker ready in .* \(node 1 of 2 of the engine at 127", follower.log.read_text())
    whole = answer(leader)
    assert whole.startswith("Dynamo is a Python framework")
    generating = re.findall(r"^dynamo\.VllmWorker +\S+ +generate ", command("status", **leader.servers).stdout, re.M)
    assert len(generating) == 1
    os.kill(follower.worker(), signal.SIGKILL)
    leader.wait_for("lost node 1 of 2 of this engine", 30)
    leader.wait_for("VllmWorker ready again", START_S)
    follower.wait_for("VllmWorker ready again")
    assert answer(leader) == whole
    assert leader.stop() == 0

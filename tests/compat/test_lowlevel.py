"""Scripts of the low-level runtime, as processes: a worker, a client, with etcd and static."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.served import ROOT


class Script:
    def __init__(self, name: str, env: dict[str, str], *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", f"tests.compat.graphs.{name}", *arguments],
            cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def lines(self) -> list[str]:
        output, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0
        return output.splitlines()


@pytest.fixture
def env(nats_server: str, etcd_server: str, request: pytest.FixtureRequest) -> dict[str, str]:
    return {"NATS_SERVER": nats_server, "ETCD_ENDPOINTS": etcd_server}


@pytest.fixture
def worker(env: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Script]:
    script = Script("lowlevel_worker", env, *getattr(request, "param", ()))
    yield script
    if script.process.poll() is None:
        script.process.send_signal(signal.SIGTERM)
        assert script.lines()[-1] == "worker stopped"


def test_dynamic(worker: Script, env: dict[str, str]) -> None:
    client = Script("lowlevel_client", env)
    assert worker.process.stdout is not None
    instance = worker.process.stdout.readline().split()[1]
    name = "a python exception was caught while processing the async generator: ValueError: no shouting"
    path = 'endpoint "instances/low-level/backend/generate"'
    lines = client.lines()
    assert lines[:7] == [
        f"ids {instance}", "generate abc", "random abc", "round_robin abc", "direct abc", "raw ['a', 'b']",
        "item None None [] False",
    ]  # fmt: skip
    errors = [line for line in lines[7:] if not line.startswith("hint: ")]
    assert errors[:2] == [f"error ['a', 'b'] {name}", f"error instance_id=12345 not found for {path}"]
    assert errors[2].startswith("error Invalid request: invalid Request: data: Field required")
    assert errors[3].startswith(f"error static() on the client of {path}")
    assert errors[4] == 'error no instances found for endpoint "instances/low-level/absent/generate"'
    assert len(errors) == 5


@pytest.mark.parametrize("worker", [["static"]], indirect=True)
def test_static_without_etcd(worker: Script, env: dict[str, str]) -> None:
    nowhere = {**env, "ETCD_ENDPOINTS": "http://127.0.0.1:1"}
    first, *rest = Script("lowlevel_client", nowhere, "static").lines()
    assert first.startswith("ids ")
    assert rest == ["generate abc", "static abc"]

"""A graph with mock engines, shared by all tests of the command line; its temporary directory hides other graphs."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dynamo.launcher.embedded_servers import free_ports
from tests.cli.terminal import COMMAND, ROOT, environment


class Graph(NamedTuple):
    """A running graph. With `env`, a command finds only this one."""

    url: str
    env: dict[str, str]
    servers: dict[str, str]
    """its NATS_SERVER and ETCD_ENDPOINTS"""


@pytest.fixture
def nothing_runs() -> Iterator[dict[str, str]]:
    """An environment in which no graph is found."""
    directory = tempfile.mkdtemp(prefix="dt-")
    yield {"TMPDIR": directory, "ETCD_ENDPOINTS": f"http://127.0.0.1:{free_ports(1)[0]}"}
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def graph() -> Iterator[Graph]:
    directory = Path(tempfile.mkdtemp(prefix="dt-"))  # short, because paths of unix sockets below it are limited
    port = free_ports(1, range(10000, 20000))[0]  # outside the range that the graph itself uses
    arguments = ("serve", "graphs.agg:Frontend", "-f", "configs/agg_mock.yaml", "--infra", "embedded")
    output = directory / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, *arguments, "--port", str(port)],
            cwd=ROOT,
            env=environment(TMPDIR=str(directory)),
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + 60
        while "\nready in" not in (text := output.read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
        nats, etcd = re.findall(r"127\.0\.0\.1:\d+", text)[:2]
        servers = {"NATS_SERVER": f"nats://{nats}", "ETCD_ENDPOINTS": f"http://{etcd}"}
        yield Graph(f"http://127.0.0.1:{port}", {"TMPDIR": str(directory)}, servers)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(40)
        shutil.rmtree(directory, ignore_errors=True)

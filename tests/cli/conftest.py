"""A graph with mock engines, shared by all tests of the command line; its temporary directory hides other graphs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.terminal import environment
from tests.ports import free_port
from tests.served import Served


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
    yield {"TMPDIR": directory, "ETCD_ENDPOINTS": f"http://127.0.0.1:{free_port()}"}
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def graph() -> Iterator[Graph]:
    directory = Path(tempfile.mkdtemp(prefix="dt-"))  # short: unix sockets go below it
    env = environment(TMPDIR=str(directory))
    served = Served(directory / "output", "-f", "configs/agg_mock.yaml", env=env)
    try:
        served.ready()
        yield Graph(served.url, {"TMPDIR": str(directory)}, served.servers)
    finally:
        served.end()
        shutil.rmtree(directory, ignore_errors=True)

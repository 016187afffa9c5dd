"""Graphs that several tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.served import Served, Start


@pytest.fixture(scope="module")
def mock_graph(serve_graph: Start) -> Served:
    """graphs.agg with two mock workers, for tests that leave it as it was."""
    return serve_graph("-f", "configs/agg_mock.yaml", "--VllmWorker.ServiceArgs.workers=2").ready()


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """What `make serve` runs: real vLLM on the CPU. Tests that use it are a group in tests/parallel.py."""
    served = Served(tmp_path_factory.mktemp("tiny") / "output", "-f", "configs/agg_tiny.yaml")
    yield served.ready(120)
    served.end()

"""Graphs of the 0.2 and 0.3 era under today's `dynamo serve`, over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.graph.conftest import Served, serve_graph

__all__ = ["serve_graph"]

HERE = Path(__file__).parent / "graphs"
Start = Callable[..., Served]


@pytest.fixture(scope="session")
def era(serve_graph: Start) -> Start:
    """Start `tests.compat.graphs.<name>:Frontend`, with its configuration where it has one."""

    def start(name: str, *arguments: str) -> Served:
        config = HERE / f"{name}.yaml"
        given = ["-f", str(config)] if config.exists() else []
        return serve_graph(*given, *arguments, graph=f"tests.compat.graphs.{name}:Frontend")

    return start

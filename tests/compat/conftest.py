"""Graphs of the 0.2 and 0.3 era under today's `dynamo serve`, over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.served import Served, Start

HERE = Path(__file__).parent / "graphs"


@pytest.fixture(scope="module")
def era(serve_graph: Start) -> Start:
    """Start `tests.compat.graphs.<name>:Frontend`, with its configuration where it has one."""

    def start(name: str, *arguments: str) -> Served:
        config = HERE / f"{name}.yaml"
        given = ["-f", str(config)] if config.exists() else []
        return serve_graph(*given, *arguments, graph=f"tests.compat.graphs.{name}:Frontend")

    return start

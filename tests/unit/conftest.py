"""Unit tests start no server: `make test-fast` runs them in a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo.launcher.embedded_servers import EmbeddedServer

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(30))


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(server: EmbeddedServer) -> None:
        raise AssertionError("a unit test starts NATS or etcd: move it to tests/contract or tests/graph")

    monkeypatch.setattr(EmbeddedServer, "start", refuse)

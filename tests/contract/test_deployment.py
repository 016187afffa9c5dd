"""Embedded servers beside a graph: restarted when they die, and an error when they keep dying."""

from __future__ import annotations

import pytest

from dynamo.errors import StartError
from dynamo.launcher import deployment
from dynamo.launcher.console import Console
from dynamo.launcher.embedded_servers import Infra


async def test_a_server_that_keeps_dying_ends_the_graph(private_infra: Infra, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "SERVER_RESTARTS", 2)
    restart, restarts = private_infra.restart_nats, 0

    async def restart_and_die() -> None:
        nonlocal restarts
        restarts += 1
        await restart()
        private_infra.processes["nats"].kill()

    monkeypatch.setattr(private_infra, "restart_nats", restart_and_die)
    private_infra.processes["nats"].kill()
    with pytest.raises(StartError, match="nats died 2 times"):
        await deployment.keep_server_running("nats", private_infra, Console())
    assert restarts == 2

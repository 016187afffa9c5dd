"""Real NATS and etcd for all tests: one pair for the session, private pairs for tests that break them."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio

from dynamo.launcher.embedded_servers import Infra, find_or_start

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine makes nothing wrong
hypothesis.settings.load_profile("untimed")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and what they start


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def infra(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Infra]:
    """NATS and etcd of the whole session: use keys and subjects of your own, and never stop or restart them."""
    infra = await find_or_start(tmp_path_factory.mktemp("infra"), "embedded")
    yield infra
    await infra.stop()


@pytest.fixture(scope="session")
def nats_server(infra: Infra) -> str:
    """The session's NATS, as in NATS_SERVER."""
    return infra.nats_url


@pytest.fixture(scope="session")
def etcd_server(infra: Infra) -> str:
    """The session's etcd, as in ETCD_ENDPOINTS."""
    return infra.etcd_endpoints


@pytest.fixture
async def private_infra(tmp_path: Path) -> AsyncIterator[Infra]:
    """NATS and etcd of one test, to kill, restart and wipe; 0.1 s."""
    infra = await find_or_start(tmp_path / "infra", "embedded")
    yield infra
    await infra.stop()

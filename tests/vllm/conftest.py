"""One import of vLLM for all tests of this folder: those that use it are a group in tests/parallel.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vllm.fork_server import ForkServer


@pytest.fixture(scope="session")
def vllm_process() -> Iterator[ForkServer]:
    with ForkServer() as found:
        yield found

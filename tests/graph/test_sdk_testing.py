"""Graphs of `dynamo.sdk.testing` as processes: the same test as in memory, see tests/unit/test_sdk_testing.py."""

from __future__ import annotations

import pytest

from dynamo.errors import StartError
from dynamo.sdk.testing import TestGraph
from tests.unit.test_sdk_testing import Failing, check_graph


async def test_a_graph_as_processes() -> None:
    await check_graph(real=True)


async def test_a_service_that_fails_to_start() -> None:
    with pytest.raises(StartError, match="no luck"):
        async with TestGraph(Failing, real=True):
            pass

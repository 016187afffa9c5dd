"""Importing nats-py does not import aiohttp."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

LOOK = "import sys, dynamo.transport.nats; print('aiohttp' in sys.modules); import aiohttp; print(aiohttp.__name__)"


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="comes with vLLM")
@pytest.mark.parametrize(("server", "there"), [("nats://a:4222", False), ("", False), ("wss://a", True)])
def test_aiohttp_is_imported_for_websockets_only(server: str, there: bool) -> None:
    env = {**os.environ, "NATS_SERVER": server}
    look = subprocess.run([sys.executable, "-c", LOOK], env=env, capture_output=True, text=True, check=True)
    assert look.stdout.split() == [str(there), "aiohttp"]

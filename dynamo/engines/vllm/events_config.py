"""vLLM's kv-events-config: a private one for our subscription, and checks of a user's."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

REPLAY_MESSAGES = 1_000
"""messages that the engine core keeps for replays"""
_PRIVATE_SOCKET = "inproc"
"""A file name. For ranks other than 0, vLLM accepts only endpoints that contain "tcp" or "inproc", and appends _dp<rank>."""


def private_events_config() -> dict[str, Any]:
    """Return a kv-events-config with sockets in a new directory that only this user can read.

    Remove the directory with `remove_sockets`.
    """
    directory = tempfile.mkdtemp(prefix="kv-", dir=os.environ.get("DYNAMO_RUN_DIR"))
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"ipc://{directory}/{_PRIVATE_SOCKET}",
        "replay_endpoint": f"ipc://{directory}/replay-{_PRIVATE_SOCKET}",
        "buffer_steps": REPLAY_MESSAGES,
    }


def remove_sockets(config: Mapping[str, Any]) -> None:
    """Remove the directory of a `private_events_config`."""
    shutil.rmtree(os.path.dirname(config["endpoint"].removeprefix("ipc://")), ignore_errors=True)


def can_subscribe(config: Any) -> bool:
    """Return True if a user's kv-events-config, a mapping or JSON, has vLLM publish where this process can subscribe."""
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError:
            return False  # vLLM's parser reports it
    if not isinstance(config, Mapping) or not config.get("enable_kv_cache_events"):
        return False
    endpoint = str(config.get("endpoint", "tcp://*:5557"))
    bound = endpoint.startswith("ipc://") or (endpoint.startswith("tcp://") and ("*" in endpoint or "::" in endpoint))
    return config.get("publisher", "zmq") == "zmq" and bound and not endpoint.endswith(":0")


def subscriber_endpoint(endpoint: str, rank: int) -> str:
    """Return the endpoint to connect to for one that a rank binds.

    vLLM adds the rank to TCP ports, and `_dp<rank>` to names that contain "inproc".
    """
    if endpoint.startswith("ipc://"):
        return f"{endpoint}_dp{rank}" if rank else endpoint
    host, _, port = endpoint.rpartition(":")
    return f"{host.replace('*', '127.0.0.1').replace('[::]', '[::1]')}:{int(port) + rank}"

"""vLLM's kv-transfer-config: ours, and what is added to one that a user gives. Imports neither vLLM nor torch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from typing import Any

from dynamo.engines.kv_transfer.session import SECRET
from dynamo.errors import StartError

LEASE_S = 30.0
"""how long blocks are kept for a reader who does not come"""
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""kv_transfer_params of a request whose KV another engine will pull; the remote_ ones are there for NIXL"""
_NIXL_HOST, _NIXL_PORT = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"


def own(lease_s: float) -> dict[str, Any]:
    """For our connector. Raises StartError where the deployment's secret is missing."""
    if not os.environ.get(SECRET):
        raise StartError(
            f"KV transfer: {SECRET} is not set",
            hint=f"set {SECRET} to the same random text for all workers; `dynamo serve` does it for its own",
        )
    return {
        "kv_connector": "PullConnector",
        "kv_connector_module_path": "dynamo.engines.kv_transfer.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lease_s": lease_s},
    }


def completed(given: Any) -> Any:
    """A user's configuration, mapping or JSON, with failed loads recomputed unless it says otherwise.

    What cannot be read is left as it is: vLLM's parser tells.
    """
    config = _mapping(given)
    return given if config is None else {"kv_load_failure_policy": "recompute", **config}


def nixl_environment(given: Any, address: str) -> dict[str, str]:
    """NIXL's side channel, which every engine of a host needs on a port of its own; empty where there is no NIXL.

    Data-parallel ranks count up from the port.
    """
    if "Nixl" not in json.dumps(_mapping(given) or ""):
        return {}
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    return {_NIXL_HOST: address, _NIXL_PORT: str(port)}


def _mapping(given: Any) -> dict[str, Any] | None:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return None
    return dict(given) if isinstance(given, Mapping) else None

"""vLLM's kv-transfer-config: for our connector, and defaults for a user's. Imports neither vLLM nor torch."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

from dynamo.config.upstream_keys import Change
from dynamo.engines.kv_transfer.session import SECRET
from dynamo.errors import StartError
from dynamo.text import from_json

LEASE_S = 30.0
"""default time for which blocks are kept for a reader"""
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""kv_transfer_params of a request whose KV another engine will pull; NIXL needs the remote_ keys"""
UPSTREAM_CONNECTOR = "DynamoNixlConnector"
"""of the patched vLLM of ai-dynamo 0.1 to 0.3"""
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
_NIXL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_NIXL_PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"


def pull_connector_config(lease_s: float) -> dict[str, Any]:
    """Return the configuration of our connector. Raises StartError if the deployment's secret is not set."""
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


def upstream_connector(
    given: Any, *, exchanges_kv: bool, several_gpus: bool = False, nixl: bool | None = None
) -> Change | None:
    """Return what takes the place of ai-dynamo's connector in a kv-transfer-config; None for any other connector.

    `exchanges_kv`: the graph has decode and prefill workers. `several_gpus`: the engine does not fit our connector.
    `nixl` None: whether NIXL is installed.
    """
    if (mapping(given) or {}).get("kv_connector") != UPSTREAM_CONNECTOR:
        return None
    key = "kv-transfer-config"
    if not exchanges_kv:
        return Change(f"{UPSTREAM_CONNECTOR} was for graphs with PrefillWorkers; remove it")
    why = f"{UPSTREAM_CONNECTOR} needed ai-dynamo's patched vLLM"
    if importlib.util.find_spec("nixl") is not None if nixl is None else nixl:
        return Change(f"{why}, and NIXL is installed", {key: NIXL}, f"read as {NIXL['kv_connector']}")
    advice = "it takes one GPU per worker, for more pip install 'dynamo[nixl]'" if several_gpus else "remove it"
    return Change(f"{why}; {advice}", fact="read as dynamo's own connector")


def with_defaults(given: Any) -> Any:
    """Return a user's configuration, a mapping or JSON, with failed loads recomputed unless it says otherwise.

    An unreadable one is returned unchanged: vLLM's parser reports it.
    """
    config = mapping(given)
    return given if config is None else {"kv_load_failure_policy": "recompute", **config}


def nixl_environment(given: Any, address: str) -> dict[str, str]:
    """Return variables that give NIXL's side channel a free port at `address`; empty for other connectors.

    Every engine of a host needs a port of its own. Data-parallel ranks use consecutive ports from this one on.
    """
    if "Nixl" not in json.dumps(mapping(given) or ""):
        return {}
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    return {_NIXL_HOST: address, _NIXL_PORT: str(port)}


def mapping(given: Any) -> dict[str, Any] | None:
    """Return a configuration, a mapping or JSON, as a dict; None if it is neither."""
    found = from_json(given)
    return dict(found) if isinstance(found, Mapping) else None

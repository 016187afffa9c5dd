"""The vLLM engine. Importing this package does not import vLLM, which takes seconds.

install       whether vLLM is installed, for which hardware, and the names of its flags
old_flags     flags of 2025 that vLLM has renamed or removed
options       the worker's settings as vLLM's environment, flags and configuration
events_config vLLM's kv-events-config: for our subscription, and whether a user's permits one
engine        AsyncLLM behind the Engine protocol
translation   requests, outputs and errors between dynamo and vLLM
stats         load and transfers, as vLLM's schedulers report them
events        KV events, from vLLM's ZeroMQ publishers
multi_node    the nodes of an engine that spans several hosts
process       child processes of an engine
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dynamo.engines.vllm.install import require_vllm

if TYPE_CHECKING:
    from dynamo.engines.vllm.engine import VllmEngine


def create(model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> VllmEngine:
    """Create an engine for a model; `arguments` are vLLM's flags. Raises StartError if vLLM is not installed."""
    require_vllm()
    from dynamo.engines.vllm.engine import VllmEngine

    return VllmEngine(model, arguments, progress)

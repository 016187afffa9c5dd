"""The vLLM engine. Importing this package does not import vLLM, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dynamo.engines.vllm.install import require_vllm

if TYPE_CHECKING:
    from dynamo.engines.vllm.engine import VllmEngine


def create(model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> VllmEngine:
    """Create an engine for a model; `arguments` are vLLM's flags. Raises StartError when vLLM is not installed."""
    require_vllm()
    from dynamo.engines.vllm.engine import VllmEngine

    return VllmEngine(model, arguments, progress)

"""An engine without a model: deterministic tokens at a modelled pace, and the KV cache and scheduler of vLLM v1.

`kv_cache` and `scheduler` are pure: no clock, no event loop. `timing` says how long a step takes; `engine` runs the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynamo.engines.mock.engine import MockEngine

__all__ = ["MockEngine", "create"]


def create(model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> MockEngine:
    return MockEngine(model, arguments, progress)

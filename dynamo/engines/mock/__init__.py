"""An inference engine without a model: deterministic tokens at a modelled pace, with vLLM v1's scheduler and KV cache.

`block_pool` and `scheduler` are pure: no clock, no event loop. `timing` gives the duration of a step; `rank` runs the
steps of one data-parallel rank on the event loop, `engine` is the whole engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynamo.engines.mock.engine import MockEngine

__all__ = ["MockEngine", "create"]


def create(model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> MockEngine:
    """Make the engine for `dynamo.engines.create`."""
    return MockEngine(model, arguments, progress)

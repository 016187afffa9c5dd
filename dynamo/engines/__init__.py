"""Inference engines behind `dynamo.llm.engine.Engine`: vLLM, and a mock that needs no model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from dynamo.errors import StartError
from dynamo.llm.engine import Engine


def create(name: str, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> Engine:
    """The engine of that name for a model; `arguments` are vLLM's flags by name, such as `max-model-len`.

    Raises StartError when there is none, or what it needs is not installed.
    """
    try:
        module = importlib.import_module(f"dynamo.engines.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"dynamo.engines.{name}":
            raise StartError(f"no engine is named {name!r}", hint="engines: vllm, mock") from None
        raise
    engine: Engine = module.create(model, arguments, progress)
    return engine

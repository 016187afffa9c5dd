"""Inference engines behind `dynamo.llm.engine.Engine`: vLLM, and a mock that needs no model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from dynamo.errors import StartError
from dynamo.llm.engine import Engine


def create(name: str, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> Engine:
    """Create the engine `name` for a model. It is not started yet.

    `arguments` are vLLM's flags by name, such as `max-model-len`; `progress` receives the steps of the start as text.
    Raises StartError if there is no such engine, or a package that it needs is not installed.
    """
    try:
        module = importlib.import_module(f"dynamo.engines.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"dynamo.engines.{name}":
            raise StartError(f"unknown engine {name!r}", hint="engines: vllm, mock") from None
        raise
    engine: Engine = module.create(model, arguments, progress)
    return engine

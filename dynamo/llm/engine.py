"""What a worker needs from an inference engine. Two exist: vLLM and the mock."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from dynamo.errors import StartError
from dynamo.llm.protocol import Delta, GenerateRequest
from dynamo.wire.stream import Stream


class EngineInfo(NamedTuple):
    """What an engine knows once it has started. Lengths in tokens."""

    context_length: int
    kv_block_size: int
    kv_blocks: int


class EngineStats(NamedTuple):
    """Load of an engine at one moment; `kv_usage` is a fraction of 0 to 1, hits and queries count tokens."""

    running: int
    waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int


class Engine(Protocol):
    """Started once, then generates for many requests at a time.

    `start` is called before any gRPC channel is open, in the main thread: an engine may fork. `generate` returns at
    once; the stream's errors are RequestError for a bad request and EngineError when the engine has failed. Cancelling
    the stream aborts the request and frees its KV blocks. `check_health` raises EngineError.
    """

    async def start(self) -> EngineInfo: ...
    def generate(self, request: GenerateRequest) -> Stream[Delta]: ...
    async def abort(self, request_id: str) -> None: ...
    def stats(self) -> EngineStats: ...
    async def check_health(self) -> None: ...
    async def stop(self) -> None: ...


def create(name: str, model: str, arguments: Mapping[str, Any], progress: Callable[[str], None]) -> Engine:
    """The engine of that name for a model; `arguments` are vLLM's flags by name, such as `max-model-len`.

    Only the chosen engine's packages are imported. Raises StartError when they are missing.
    """
    try:
        module = importlib.import_module(f"dynamo.llm.engines.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"dynamo.llm.engines.{name}":
            raise StartError(f"no engine is named {name!r}", hint="engines: vllm, mock") from None
        raise StartError(
            f"engine {name!r} needs the package {error.name!r}, which is not installed",
            hint='pip install "dynamo[cpu]" or "dynamo[gpu]", or set engine: mock',
        ) from None
    engine: Engine = module.create(model, arguments, progress)
    return engine

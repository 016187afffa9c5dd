"""A model whose engine runs in this process, for the OpenAI server: no NATS, no etcd, no other process."""

from __future__ import annotations

import time
from collections.abc import Awaitable

from dynamo.llm.engine import Engine
from dynamo.llm.preprocess import Preprocessor
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, GenerateRequest, ServedModel
from dynamo.streams import Stream


class EngineModel:
    """A `Backend` with one model."""

    def __init__(self, name: str, source: str, engine: Engine, preprocessor: Preprocessor) -> None:
        self._model = ServedModel(name, source, preprocessor.context_length, int(time.time()))
        self._engine = engine
        self._preprocessor = preprocessor

    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return Stream.opening(self._generate(self._preprocessor.chat(request)))

    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        stream = Stream.opening(self._generate(self._preprocessor.completion(request)))
        return self._preprocessor.echo(request, stream) if request.echo else stream

    async def _generate(self, request: Awaitable[GenerateRequest]) -> Stream[Delta]:
        return self._engine.generate(await request)

    def models(self) -> list[ServedModel]:
        return [self._model]

    def instance_counts(self) -> dict[str, int]:
        return {self._model.name: 1}

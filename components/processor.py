"""Processor: turns messages into tokens, chooses a worker, and hands its deltas on."""

from __future__ import annotations

import json
from typing import Literal

import msgspec

from components.worker import VllmWorker
from dynamo.llm.models import tokenizer_dir
from dynamo.llm.preprocess import Preprocessor
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, GenerateRequest
from dynamo.llm.tokenizer import Tokenizer
from dynamo.sdk import Service, Stream, async_on_start, depends, endpoint, random, round_robin, service

DEFAULT_CONTEXT_TOKENS = 4096


@service(dynamo={"namespace": "dynamo"}, resources={"cpu": "10", "memory": "20Gi"}, workers=1)
class Processor(Service):
    worker = depends(VllmWorker)

    def __init__(
        self,
        model: str = "",
        block_size: int = 64,
        max_model_len: int | None = None,
        router: Literal["round-robin", "random"] = "round-robin",
    ) -> None:
        """
        Args:
            model: whose tokenizer and chat template are used; the workers' model.
            block_size: tokens in a KV block, as the workers have it.
            max_model_len: context length in tokens; None: what the model's config.json says.
            router: how a worker is chosen.
        """
        self.model, self.block_size, self.max_model_len, self.router = model, block_size, max_model_len, router

    @async_on_start
    async def load(self) -> None:
        directory = tokenizer_dir(self.model)
        length = self.max_model_len
        if length is None:
            config = json.loads((directory / "config.json").read_text("utf-8"))
            length = int(config.get("max_position_embeddings", DEFAULT_CONTEXT_TOKENS))
        self.preprocessor = Preprocessor(Tokenizer(directory), length)

    @endpoint(name="chat/completions")
    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return Stream.opening(self._chat(request))

    @endpoint(name="completions")
    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        return Stream.opening(self._completion(request))

    async def _chat(self, request: ChatRequest) -> Stream[Delta]:
        return self._generate(await self.preprocessor.chat(request))

    async def _completion(self, request: CompletionRequest) -> Stream[Delta]:
        stream = self._generate(await self.preprocessor.completion(request))
        return _echoed(self.preprocessor.prompt_text(request), stream) if request.echo else stream

    def _generate(self, request: GenerateRequest) -> Stream[Delta]:
        choose = random if self.router == "random" else round_robin
        return choose(self.worker).generate(request)


def _echoed(prompt: str, stream: Stream[Delta]) -> Stream[Delta]:
    """Put the prompt's text in front of each choice's first delta."""
    seen: set[int] = set()

    def add(delta: Delta) -> Delta:
        if delta.index in seen:
            return delta
        seen.add(delta.index)
        return msgspec.structs.replace(delta, text=prompt + delta.text)

    return stream.map(add)


if (
    __name__ == "__main__"
):  # python -m components.processor -f configs/agg.yaml: this service alone, under a debugger too
    from dynamo.serve.foreground import alone

    alone(Processor)

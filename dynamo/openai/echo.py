"""A model that repeats what it is asked: the last message, or the prompt. It needs no engine and no tokenizer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, ServedModel
from dynamo.streams import Stream


class EchoModel:
    """A `Backend` with one model, and the endpoint of a worker that yields OpenAI's chunks: `chunks`."""

    def __init__(self, name: str, delay_s: float) -> None:
        """`delay_s` is the time between two characters."""
        self._model = ServedModel(name, name, 0, int(time.time()))
        self._delay_s = delay_s

    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return Stream.from_iterator(self._echo(_text(request.messages[-1]), request.sampling.n))

    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        prompt = request.prompt if isinstance(request.prompt, str) else " ".join(map(str, request.prompt))
        return Stream.from_iterator(self._echo(prompt, request.sampling.n))

    async def _echo(self, text: str, choices: int) -> AsyncIterator[Delta]:
        prompt_tokens: int | None = len(text)
        for number, character in enumerate(text, 1):
            await asyncio.sleep(self._delay_s)
            for index in range(choices):
                reason = "stop" if number == len(text) else None
                yield Delta(character, [0], index, reason, None, prompt_tokens)  # type: ignore[arg-type]
                prompt_tokens = None

    async def chunks(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answer an OpenAI chat request with chunks."""
        async for delta in self._echo(_text(request["messages"][-1]), 1):
            choice = {"index": 0, "delta": {"content": delta.text}, "finish_reason": delta.finish_reason}
            yield {"object": "chat.completion.chunk", "model": self._model.name, "choices": [choice]}

    def models(self) -> list[ServedModel]:
        return [self._model]

    def instance_counts(self) -> dict[str, int]:
        return {self._model.name: 1}


def _text(message: dict[str, Any]) -> str:
    """Return the text of a message; a space if it has none, since a choice needs an end."""
    content = message.get("content") or " "
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content) or " "

"""The interface between the OpenAI server and what generates: the Frontend component, or a fake in a test."""

from __future__ import annotations

from typing import Any, Protocol

from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, ServedModel
from dynamo.streams import Stream


class Backend(Protocol):
    def chat(self, request: ChatRequest) -> Stream[Delta]: ...

    def completion(self, request: CompletionRequest) -> Stream[Delta]: ...

    def forward(self, api: str, request: dict[str, Any]) -> Stream[Any]:
        """Send an OpenAI request to the worker of its model, and return the chunks that it yields.

        Called for the `ServedModel.forwarded` APIs of a model only; `api` is "chat" or "completion".
        """
        ...

    def models(self) -> list[ServedModel]:
        """Return the models that can answer now."""
        ...

    def instance_counts(self) -> dict[str, int]:
        """Return, for each service behind the server, how many instances can be called."""
        ...

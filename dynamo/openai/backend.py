"""The interfaces between the OpenAI server and what generates: the Frontend component, or a fake in a test.

A model in `models()` says which of the two answers each API: `Forwarder` those in its `forwarded`, `Backend` the others.
"""

from __future__ import annotations

from typing import Any, Protocol

from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, ServedModel
from dynamo.streams import Stream


class Models(Protocol):
    """What is served."""

    def models(self) -> list[ServedModel]:
        """Return the models that can answer now."""
        ...

    def instance_counts(self) -> dict[str, int]:
        """Return, for each service behind the server, how many instances can be called."""
        ...


class Backend(Models, Protocol):
    """Answers requests of this project's own kind."""

    def chat(self, request: ChatRequest) -> Stream[Delta]: ...

    def completion(self, request: CompletionRequest) -> Stream[Delta]: ...


class Forwarder(Models, Protocol):
    """Passes OpenAI's requests on to workers that take them."""

    def forward(self, api: str, request: dict[str, Any]) -> Stream[Any]:
        """Send an OpenAI request to the worker of its model, and return the chunks that it yields.

        `api` is "chat" or "completion".
        """
        ...

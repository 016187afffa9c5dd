"""Responses of workers that yield OpenAI's own chunks: passed on as they are, or folded into one body.

A worker writes what it wants into its chunks: roles, tool calls, reasoning. Only the id, the model's name and the time are
set here, so that they are the same in all chunks of a response.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson

from dynamo.errors import DynamoError, EngineError, RequestError
from dynamo.llm.protocol import Delta, TokenLogprob
from dynamo.openai.responses import DONE, ResponseBuilder, event

SSE_PREFIX = "data:"
END = "[DONE]"
"""the last event of a stream; ours is written when the worker's stream has ended"""


class ForwardedChunk(NamedTuple):
    """A worker's chunk; it takes the place of a `Delta`, of which the writers read `token_ids` only."""

    event: bytes
    """what a stream gets; empty for a chunk that the client has not asked for"""
    token_ids: range
    """one for each piece of text: the worker does not say how many tokens it is"""
    choices: list[dict[str, Any]]


NOTHING = ForwardedChunk(b"", range(0), [])


class ForwardedResponse(ResponseBuilder):
    """Builds the response to one request from the chunks of a worker."""

    def __init__(self, response_id: str, model: str, choices: int = 1, *, include_usage: bool = False) -> None:
        super().__init__(response_id, model, choices, include_usage=include_usage)
        self._folded: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None
        self._started = False

    def accept(self, item: Any) -> Any:
        """Return a chunk as `ForwardedChunk`.

        Raises EngineError for what is no chunk, and the error that it reports, if so.
        """
        if isinstance(item, str) and item.removeprefix(SSE_PREFIX).strip() == END:
            return NOTHING
        chunk = self._parse(item)
        self._started = True
        choices: list[dict[str, Any]] = chunk["choices"]
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._take_usage(usage)
            if not choices and not self.include_usage:
                return NOTHING
        if any(isinstance(choice.get("message"), dict) for choice in choices):  # a whole response in place of chunks
            choices = [{"delta": choice.get("message"), **choice} for choice in choices]
        text = sum(map(self._has_output, choices))
        if self._usage is None:
            self.output_tokens += text
        try:
            written = event({**chunk, **self._head(self.chunk_object), "choices": choices})
        except TypeError as error:  # bytes, or integers of more than 64 bits
            raise EngineError(f"the worker of {self.model} yielded a chunk that JSON cannot hold: {error}") from None
        return ForwardedChunk(written, range(text), choices)

    def _parse(self, item: Any) -> dict[str, Any]:
        chunk = item
        if isinstance(item, str):  # as text, or as a server-sent event
            try:
                chunk = orjson.loads(item.removeprefix(SSE_PREFIX))
            except orjson.JSONDecodeError:
                chunk = None
        if isinstance(chunk, dict):
            if chunk.get("error") or chunk.get("object") == "error":
                raise _reported(chunk.get("error") or chunk)
            choices = chunk.get("choices")
            if isinstance(choices, list) and all(map(_is_choice, choices)):
                return chunk
        raise EngineError(
            f"the worker of {self.model} yielded something else than {self.chunk_object}: {item!r:.80}",
            hint="it should yield OpenAI's chunks, as dicts with `choices`",
        )

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self._usage = usage
        self.prompt_tokens = _count(usage.get("prompt_tokens"))
        self.output_tokens = _count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        self.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0

    @property
    def complete(self) -> bool:
        """True once there was a chunk: a worker may leave out the finish reason."""
        return self._started

    @staticmethod
    def merge(deltas: Iterable[Any]) -> list[Any]:
        """Join chunks that wait to be written."""
        chunks = list(deltas)
        return [ForwardedChunk(b"".join(c.event for c in chunks), range(sum(len(c.token_ids) for c in chunks)), [])]

    def chunk(self, delta: Any) -> bytes:
        found: bytes = delta.event
        return found

    def closing(self) -> bytes:
        return DONE

    def add(self, delta: Any) -> None:
        for choice in delta.choices:
            index = choice.get("index") or 0
            kept = self._folded.setdefault(index, {"index": index, "logprobs": None, "finish_reason": None})
            for key, value in choice.items():
                if key != "message":
                    kept[key] = fold(kept.get(key), copy.deepcopy(value), key)

    def body(self) -> bytes:
        choices = [self._whole(choice) for _, choice in sorted(self._folded.items())]
        found = {**self._head(self.object), "choices": choices}
        return orjson.dumps(found if self._usage is None else {**found, "usage": self._usage})

    @abstractmethod
    def _has_output(self, choice: dict[str, Any]) -> bool:
        """Return True for a choice of a chunk that has text, or part of a tool call."""

    @abstractmethod
    def _whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return a choice of the body from its folded chunks."""

    def _chunk_choice(
        self, index: int, text: str | None, logprobs: list[TokenLogprob] | None, finish: Delta | None
    ) -> dict[str, Any]:
        raise NotImplementedError("chunks are the worker's own")

    _body_choice = _chunk_choice


class ForwardedChat(ForwardedResponse):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _has_output(self, choice: dict[str, Any]) -> bool:
        return any(value for key, value in (choice.get("delta") or {}).items() if key != "role")

    def _whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        delta = choice.pop("delta", None) or {}
        tools = delta.get("tool_calls")
        if isinstance(tools, list):
            delta["tool_calls"] = [
                {k: v for k, v in tool.items() if k != "index"} if isinstance(tool, dict) else tool for tool in tools
            ]
        return {**choice, "message": {"content": None, **delta, "role": delta.get("role") or "assistant"}}


class ForwardedCompletion(ForwardedResponse):
    object = "text_completion"
    chunk_object = "text_completion"

    def _has_output(self, choice: dict[str, Any]) -> bool:
        return bool(choice.get("text"))

    def _whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {"text": "", **choice}


WHOLE = ("id", "type", "role", "name", "finish_reason", "stop_reason")
"""keys whose value is whole in one chunk, and may be repeated in others"""


def fold(before: Any, new: Any, key: str = "") -> Any:
    """Return the value of a key after one more chunk: text and lists grow, objects are folded key by key.

    Objects in a list that have an index, such as tool calls, are folded with the one of the same index. `before` may be
    changed, and parts of both become parts of the result.
    """
    if new is None or before is None:
        return before if new is None else new
    if isinstance(before, str) and isinstance(new, str):
        return new if key in WHOLE else before + new
    if isinstance(before, dict) and isinstance(new, dict):
        return before | {name: fold(before.get(name), value, name) for name, value in new.items()}
    if isinstance(before, list) and isinstance(new, list):
        return _fold_lists(before, new)
    return new


def _fold_lists(before: list[Any], new: list[Any]) -> list[Any]:
    for item in new:
        index = item.get("index") if isinstance(item, dict) else None
        for i, known in enumerate(before):
            if index is not None and isinstance(known, dict) and known.get("index") == index:
                before[i] = fold(known, item)
                break
        else:
            before.append(item)
    return before


def _is_choice(value: Any) -> bool:
    """Return True for a choice whose index and parts have the types of OpenAI's."""
    if not isinstance(value, dict) or not isinstance(value.get("index") or 0, int):
        return False
    return all(isinstance(value.get(part), dict | None) for part in ("delta", "message"))


def _count(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _reported(error: Any) -> DynamoError:
    """Return the error that a worker yielded: a text, or an object in OpenAI's form or in vLLM's."""
    found = error if isinstance(error, dict) else {"message": error}
    message = str(found.get("message") or "the worker reported an error without a message")
    code = found.get("code")
    return RequestError(message) if isinstance(code, int) and 400 <= code < 500 else EngineError(message)

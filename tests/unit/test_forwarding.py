"""Chunks of foreign workers: passed on, folded into a body, refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from dynamo.errors import EngineError, RequestError
from dynamo.openai.forwarding import ForwardedChat, ForwardedCompletion, ForwardedResponse


def chunk(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def folded(response: ForwardedResponse, *items: Any) -> dict[str, Any]:
    for item in items:
        response.add(response.accept(item))
    body: dict[str, Any] = orjson.loads(response.body())
    return body


def streamed(response: ForwardedResponse, *items: Any) -> list[dict[str, Any]]:
    out = b"".join(response.chunk(response.accept(item)) for item in items)
    return [orjson.loads(event.removeprefix("data: ")) for event in out.decode().split("\n\n") if event]


def test_any_field_of_a_delta_is_folded() -> None:
    body = folded(
        ForwardedChat("id", "m"),
        chunk(role="assistant", content=None, reasoning_content="let "),
        chunk(role="assistant", reasoning_content="me"),
        chunk(content="a"),
        chunk(content="b"),
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    )
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "ab", "reasoning_content": "let me"}
    assert choice["finish_reason"] == "stop"
    assert "usage" not in body


def test_choices_are_separated_by_their_index() -> None:
    body = folded(
        ForwardedCompletion("id", "m", 2),
        {"choices": [{"index": 1, "text": "b"}]},
        {"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]},
    )
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a"), (1, "bb")]


def test_log_probabilities_are_concatenated() -> None:
    one = {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"token": "a"}]}}]}
    body = folded(ForwardedChat("id", "m"), one, one)
    assert body["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "a"}]}


def test_chunks_as_text_and_as_events() -> None:
    text = orjson.dumps(chunk(content="a")).decode()
    assert len(streamed(ForwardedChat("id", "m"), text, f"data: {text}\n\n")) == 2


def test_a_whole_response_in_place_of_chunks() -> None:
    whole = {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}],
    }
    mixed = folded(ForwardedChat("id", "m"), {"choices": [{"index": 0, "delta": {"content": "a"}, "message": None}]})
    assert mixed["choices"][0]["message"]["content"] == "a"
    (event,) = streamed(ForwardedChat("id", "m"), whole)
    assert event["object"] == "chat.completion.chunk"
    assert event["choices"][0]["delta"] == {"content": "hi"}
    assert folded(ForwardedChat("id", "m"), whole)["choices"][0]["message"]["content"] == "hi"


def test_usage_is_shown_to_those_who_asked() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
    asked, other = ForwardedChat("id", "m", include_usage=True), ForwardedChat("id", "m")
    assert streamed(asked, usage)[0]["usage"]["total_tokens"] == 5
    assert streamed(other, usage) == []
    assert (other.prompt_tokens, other.output_tokens) == (3, 2)


NO_CHUNKS = [
    5, None, "no JSON", b"{}", [], {}, {"choices": None}, {"choices": [1]}, {"choices": [{"index": "1"}]},
    {"choices": [{"delta": "text"}]}, {"choices": [{"message": ["text"]}]},
]  # fmt: skip


@pytest.mark.parametrize("item", NO_CHUNKS)
def test_what_is_no_chunk_is_an_error(item: Any) -> None:
    with pytest.raises(EngineError, match=r"the worker of m yielded something else than chat\.completion\.chunk"):
        ForwardedChat("id", "m").accept(item)


@pytest.mark.parametrize("value", [b"bytes", 1 << 64, "\ud800", {1: "key"}])
def test_what_json_cannot_hold_is_an_error(value: Any) -> None:
    with pytest.raises(EngineError, match="the worker of m yielded a chunk that JSON cannot hold"):
        ForwardedChat("id", "m").accept(chunk(content=value))


def test_the_last_event_of_a_worker_is_left_out() -> None:
    response = ForwardedChat("id", "m")
    assert len(streamed(response, chunk(content="a"), "data: [DONE]\n\n", "[DONE]")) == 1
    assert response.closing() == b"data: [DONE]\n\n"


def test_counts_that_are_none_are_not_counted() -> None:
    response = ForwardedChat("id", "m")
    response.accept({"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": "5"}})
    assert (response.prompt_tokens, response.output_tokens) == (0, 0)


def test_errors_that_a_worker_yields() -> None:
    for error in ({"error": "no memory"}, {"object": "error", "error": "no memory"}):
        with pytest.raises(EngineError, match="no memory"):
            ForwardedChat("id", "m").accept(error)
    with pytest.raises(RequestError, match="too long"):
        ForwardedChat("id", "m").accept({"object": "error", "message": "too long", "code": 400})
    with pytest.raises(EngineError, match="out of memory"):
        ForwardedChat("id", "m").accept({"error": {"message": "out of memory", "code": 500}})


def test_chunks_that_wait_are_joined() -> None:
    response = ForwardedChat("id", "m")
    waiting = [response.accept(chunk(content=str(i))) for i in range(100)]
    (joined,) = response.merge(waiting)
    assert response.chunk(joined) == b"".join(response.chunk(one) for one in waiting)
    assert len(joined.token_ids) == 100

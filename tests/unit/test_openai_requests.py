"""OpenAI's request models: accepted fields, their translation, and the parameter that an error names."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.errors import RequestError
from dynamo.llm.protocol import ChatRequest, CompletionRequest
from dynamo.openai import json_schema
from dynamo.openai.field_types import MAX_PROMPTS
from dynamo.openai.schema import ChatCompletionRequest, TextCompletionRequest
from dynamo.openai.validation import parse

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse(ChatCompletionRequest, json.dumps(body).encode()).to_request()


def text(**fields: Any) -> list[CompletionRequest]:
    return parse(TextCompletionRequest, json.dumps({"model": "m", **fields}).encode()).to_requests()


def refused(function: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        function(**fields)
    return caught.value


def test_defaults() -> None:
    sampling = chat().sampling
    assert (sampling.n, sampling.max_tokens, sampling.temperature, sampling.stop) == (1, None, None, [])
    assert text(prompt="x")[0].sampling.max_tokens == 16


def test_fields_reach_the_engine() -> None:
    sampling = chat(
        n=2, max_tokens=7, temperature=1, top_p=0.5, top_k=5, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, seed=-3, stop="end", stop_token_ids=[4], min_tokens=2, ignore_eos=True,
        include_stop_str_in_output=True, skip_special_tokens=False, logit_bias={"5": -100}, priority=3,
        logprobs=True, top_logprobs=4,
    ).sampling  # fmt: skip
    assert (sampling.n, sampling.max_tokens, sampling.min_tokens, sampling.seed) == (2, 7, 2, -3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 0.5, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.stop, sampling.stop_token_ids, sampling.logit_bias) == (["end"], [4], {"5": -100})
    assert (sampling.ignore_eos, sampling.include_stop_str_in_output, sampling.skip_special_tokens) == (
        True,
        True,
        False,
    )
    assert (sampling.logprobs, sampling.priority) == (4, 3)
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=False).sampling.logprobs is None


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=9).sampling.max_tokens == 9


def test_null_is_not_given() -> None:
    every = {name: None for name in ChatCompletionRequest.model_fields if name not in ("messages", "model")}
    assert chat(**every) == chat()
    every = {name: None for name in TextCompletionRequest.model_fields if name not in ("prompt", "model")}
    assert text(prompt="x", **every) == text(prompt="x")


def test_fields_of_openai_without_effect_are_known() -> None:
    accepted: dict[str, Any] = {
        "user": "u", "metadata": {"k": "v"}, "store": False, "service_tier": "flex", "parallel_tool_calls": True,
        "reasoning_effort": "low", "verbosity": "low", "modalities": ["text"], "prompt_cache_key": "k",
        "safety_identifier": "s", "stream_options": {"include_usage": True, "include_obfuscation": False}, "stream": True,
    }  # fmt: skip
    body = {"messages": [{"role": "user", "content": "hi"}], **accepted}
    found = parse(ChatCompletionRequest, json.dumps(body).encode())
    assert not found.model_extra
    assert found.include_usage


def test_messages_of_a_conversation_with_tools() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "12:00"},
        {"role": "assistant", "content": "noon", "refusal": None, "annotations": []},
    ]
    assert chat(messages=messages).messages == messages


def test_tools() -> None:
    assert chat(tools=[TOOL]).tools == [TOOL]
    assert chat(tools=[TOOL], tool_choice="none").tools is None
    assert chat(tools=[]).tools is None
    named = {"type": "function", "function": {"name": "now"}}
    assert chat(tools=[TOOL], tool_choice=named).tool_choice == named
    assert refused(chat, tool_choice="required").param == "tool_choice"
    assert refused(chat, tools=[TOOL], tool_choice="sometimes").param == "tool_choice"
    other = {"type": "function", "function": {"name": "later"}}
    assert "'later'" in refused(chat, tools=[TOOL], tool_choice=other).message
    assert refused(chat, tools=[{"type": "function"}]).param == "tools.0.function"
    assert refused(chat, tools=[{"type": "function", "function": {"name": ""}}]).param == "tools.0.function.name"
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "dict"}}}
    assert refused(chat, tools=[bad]).param == "tools.0.function.parameters"


def test_structured_output() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    formats: list[tuple[Any, Any]] = [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}, {"json": schema}),
    ]
    for given_format, expected in formats:
        assert chat(response_format=given_format).sampling.structured == expected
    assert chat(guided_json=schema).sampling.structured == {"json": schema}
    assert chat(guided_choice=["a", "b"]).sampling.structured == {"choice": ["a", "b"]}
    assert chat(structured_outputs={"regex": "a+"}).sampling.structured == {"regex": "a+"}
    assert chat(structured_outputs={"json_object": False}).sampling.structured is None
    assert text(prompt="x", guided_regex="a+")[0].sampling.structured == {"regex": "a+"}


def test_invalid_structured_output() -> None:
    def wanted(schema: Any) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    assert refused(chat, response_format={"type": "json_schema"}).param == "response_format.json_schema"
    assert refused(chat, response_format=wanted("text")).param == "response_format.json_schema.schema"
    wrong = refused(chat, response_format=wanted({"type": "object", "properties": {"a": {"type": "int"}}}))
    assert wrong.param == "response_format.json_schema.schema"
    assert "properties.a.type: 'int' is not one of ['array', " in wrong.message
    assert refused(chat, response_format={"type": "json_object"}, guided_regex="a").param == "response_format"
    assert refused(chat, guided_regex="a", guided_choice=["a"]).param == "guided_choice"
    assert refused(chat, guided_choice=[]).param == "guided_choice"
    assert refused(chat, guided_json={"required": "a"}).param == "guided_json"


RANGES: list[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", 2.1), ("top_p", 0), ("top_p", 1.1), ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1), ("n", 0), ("n", 129), ("max_tokens", 0), ("max_completion_tokens", -1),
    ("top_k", -2), ("min_p", 1.1), ("repetition_penalty", 0), ("min_tokens", -1), ("seed", 2**63),
    ("logit_bias", {"x": 1}), ("logit_bias", {"²": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": "5"}),
    ("logit_bias", [1]), ("stop", ["a"] * 5), ("stop", [""]), ("stop", [1]), ("stop", {"a": 1}),
]  # fmt: skip
TYPES: list[tuple[str, Any]] = [
    ("temperature", "1"), ("temperature", True), ("n", 1.0), ("n", "1"), ("max_tokens", True), ("stream", 1),
    ("seed", 0.5), ("seed", 10**30), ("user", 5), ("stop_token_ids", ["a"]), ("ignore_eos", "yes"),
    ("messages", {}), ("messages", "hi"), ("messages", ["hi"]), ("tools", {}), ("response_format", "json"),
    ("top_logprobs", "5"), ("model", 5), ("stream_options", True), ("guided_json", 5), ("metadata", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), RANGES + TYPES)
def test_errors_name_their_parameter(name: str, value: Any) -> None:
    error = refused(chat, **{name: value})
    assert error.status == 400
    assert error.param is not None
    assert error.param.split(".")[0] == name
    assert f"'{error.param}'" in error.message
    assert "Input should" not in error.message
    assert "\n" not in error.message


def test_wording() -> None:
    assert refused(chat, temperature="1").message == (
        "Invalid type for 'temperature': expected a number, but got a string."
    )
    assert refused(chat, messages=[{"content": "x"}]).message == "Missing required parameter: 'messages.0.role'."
    assert "Expected a value >= 1, but got 0" in refused(chat, n=0).message
    assert refused(chat, guided_json=5).message.endswith("expected an object or a string, but got an integer.")
    many = refused(chat, stop=["a", "b", "c", "d", "e"])
    assert "at most 4" in many.message


def test_combinations() -> None:
    assert refused(chat, top_logprobs=1).param == "top_logprobs"
    assert refused(chat, stream_options={"include_usage": True}).param == "stream_options"
    assert refused(chat, max_tokens=3, min_tokens=4).param == "min_tokens"
    assert refused(text, prompt="x", min_tokens=17).param == "min_tokens"
    assert refused(text, prompt="x", suffix="y").param == "suffix"
    assert refused(text, prompt="x", best_of=2).param == "best_of"
    assert refused(text, prompt="x", echo=True, logprobs=1).param == "echo"
    assert text(prompt="x", n=2, best_of=2)[0].sampling.n == 2


def test_prompts() -> None:
    assert [r.prompt for r in text(prompt="a")] == ["a"]
    assert [r.prompt for r in text(prompt=["a", "b"])] == ["a", "b"]
    assert [r.prompt for r in text(prompt=[1, 2])] == [[1, 2]]
    assert [r.prompt for r in text(prompt=[[1], [2, 3]])] == [[1], [2, 3]]
    for wrong in (5, {}, [], ["a", 1], [1, "a"], [[1, "a"]], [1.5], [True], [None], ["a"] * (MAX_PROMPTS + 1)):
        assert refused(text, prompt=wrong).param == "prompt"
    assert refused(text).message == "Missing required parameter: 'prompt'."


def test_each_prompt_has_sampling_of_its_own() -> None:
    first, second = text(prompt=["a", "b"])
    first.sampling.max_tokens = 3
    assert second.sampling.max_tokens == 16


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted({*ChatCompletionRequest.model_fields, *TextCompletionRequest.model_fields, "other"}))


@given(st.dictionaries(FIELDS, JSON, max_size=5), st.booleans())
def test_any_json_is_accepted_or_refused_with_a_request_error(fields: dict[str, Any], sound: bool) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"} if sound else {}
    encoded = json.dumps({**body, **fields}).encode()
    for kind in (ChatCompletionRequest, TextCompletionRequest):
        with contextlib.suppress(RequestError):
            parsed: Any = parse(kind, encoded)
            parsed.to_request() if kind is ChatCompletionRequest else parsed.to_requests()


@given(JSON)
def test_any_json_is_a_schema_or_has_an_error(value: Any) -> None:
    found = json_schema.find_error(value, "schema")
    assert found is None or found[0].startswith("schema")


def test_schemas() -> None:
    sound: list[Any] = [
        True,
        {},
        {"type": ["string", "null"], "enum": ["a", None]},
        {"$defs": {"n": {"type": "number", "exclusiveMinimum": 0}}, "anyOf": [{"$ref": "#/$defs/n"}, False]},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "x-own": 5},
        {"items": [{"type": "string"}, {"type": "number"}], "required": True, "exclusiveMinimum": True},
        {"properties": {"type": {"type": "string"}, "required": {"const": 1}}, "additionalProperties": False},
    ]
    for schema in sound:
        assert json_schema.find_error(schema, "s") is None
    wrong: list[tuple[Any, str]] = [
        ({"type": "strnig"}, "s.type"),
        ({"properties": []}, "s.properties"),
        ({"properties": {"a": {"items": {"type": 5}}}}, "s.properties.a.items.type"),
        ({"anyOf": []}, "s.anyOf"),
        ({"enum": []}, "s.enum"),
        ({"required": [1]}, "s.required.0"),
        ({"minLength": -1}, "s.minLength"),
        ({"maximum": "9"}, "s.maximum"),
        ({"$ref": 5}, "s.$ref"),
        ({"additionalProperties": "no"}, "s.additionalProperties"),
        ({"items": [{"type": "string"}, {"type": "int"}]}, "s.items.1.type"),
        ({"minItems": True}, "s.minItems"),
    ]
    for schema, path in wrong:
        found = json_schema.find_error(schema, "s")
        assert found is not None
        assert found[0] == path
    deep: Any = {}
    for _ in range(200):
        deep = {"not": deep}
    assert json_schema.find_error(deep, "s") == ("s", "nested more than 128 deep")
    nested: Any = {}
    for _ in range(30):
        nested = {"properties": {"a": {"type": "array", "items": nested}}}
    assert json_schema.find_error(nested, "s") is None
    long = json_schema.find_error({"type": "x" * 1000}, "s")
    assert long is not None
    assert len(long[1]) < 300

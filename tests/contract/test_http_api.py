"""The OpenAI server as its clients use it, over a real connection: routes, bodies, streams, errors, limits, keys."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from dynamo.errors import (
    ContextLengthError,
    EngineError,
    ModelNotFoundError,
    NoInstancesError,
    OverloadedError,
    RequestError,
    WorkerLostError,
)
from dynamo.llm.protocol import Delta, TokenLogprob
from tests.http_backend import MODEL, Call, Site, chat, events, site, without_direct

pytestmark = pytest.mark.asyncio(loop_scope="module")


def hello(call: Call) -> None:
    call.say("Hel", "lo", " wörld 🌍")


@pytest_asyncio.fixture(params=["direct", "send"], scope="module", loop_scope="module")
async def running(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """Both ways in which a stream's chunks reach the socket; one server each for the module."""
    around = without_direct if request.param == "send" else lambda app: app
    async with site(hello, around=around) as found:
        yield found


@pytest.fixture
def served(running: Site) -> Site:
    running.backend.script, running.backend.served = hello, [MODEL]
    running.backend.calls.clear()
    return running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def connections() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        yield client


@pytest.fixture
def http(served: Site, connections: httpx.AsyncClient) -> httpx.AsyncClient:
    connections.base_url = served.url  # type: ignore[assignment]
    return connections


@pytest.fixture
def client(served: Site, connections: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, http_client=connections)


MESSAGES: Any = [{"role": "user", "content": "hi"}]


# -- chat completions


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL.name, messages=MESSAGES)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL.name
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello wörld 🌍"
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 3, 8)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id
    assert answer.system_fingerprint


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL.name, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello wörld 🌍"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8
    assert all(c.usage is None for c in chunks[:-1])


async def test_the_bytes_of_a_stream(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat(stream=True, stream_options={"include_usage": True}))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in answer.headers
    found = events(answer.text)
    assert found[-1] == "[DONE]"
    assert found[-2]["choices"] == []
    assert all(chunk["usage"] is None for chunk in found[:-2])
    assert found[-3]["choices"][0]["delta"] == {}


async def test_no_usage_unless_asked(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat(stream=True))
    found = events(answer.text)
    assert found.pop() == "[DONE]"
    assert all("usage" not in chunk and chunk["choices"] for chunk in found)


async def test_several_choices(served: Site, client: openai.AsyncOpenAI) -> None:
    def two(call: Call) -> None:
        assert call.request.sampling.n == 3
        for word in ("a", "b"):
            for index in (2, 0):
                call.push(f"{word}{index}", index=index, prompt=7 if (word, index) == ("a", 0) else None)
        for index in (0, 2):
            call.push("", index=index, end=True)
        call.push("", index=1, end=True)  # a choice without any text
        call.channel.end()

    served.backend.script = two
    answer = await client.chat.completions.create(model=MODEL.name, messages=MESSAGES, n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, "a0b0"), (1, ""), (2, "a2b2")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 4)
    stream = await client.chat.completions.create(model=MODEL.name, messages=MESSAGES, n=3, stream=True)
    texts = {0: "", 1: "", 2: ""}
    roles, ends = [], []
    async for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
        ends += [choice.index] if choice.finish_reason else []
    assert texts == {0: "a0b0", 1: "", 2: "a2b2"}
    assert roles == [0, 1, 2]
    assert sorted(ends) == [0, 1, 2]


def _position(token: str, at: int) -> TokenLogprob:
    return TokenLogprob(token, at, -0.5, [(token, at, -0.5), ("ü", 9, -1.5)])


def with_logprobs(call: Call) -> None:
    for i, text in enumerate(("Hel", "lo")):
        finish: Any = "stop" if i else None
        call.channel.push(Delta(text, [i], 0, finish, None, 4 if i == 0 else None, 0, [_position(text, i)]))
    call.channel.end()


async def test_chat_logprobs(served: Site, client: openai.AsyncOpenAI) -> None:
    served.backend.script = with_logprobs
    answer = await client.chat.completions.create(model=MODEL.name, messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert served.backend.calls[0].request.sampling.logprobs == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [p.token for p in logprobs.content] == ["Hel", "lo"]
    assert logprobs.content[0].bytes == list(b"Hel")
    assert logprobs.content[0].top_logprobs[1].bytes == list("ü".encode())
    stream = await client.chat.completions.create(model=MODEL.name, messages=MESSAGES, logprobs=True, stream=True)
    found = []
    async for chunk in stream:
        for position in (chunk.choices[0].logprobs.content or []) if chunk.choices[0].logprobs else []:
            assert position.top_logprobs == []  # none were asked for
        if chunk.choices[0].logprobs and chunk.choices[0].logprobs.content:
            found += [(p.token, chunk.choices[0].delta.content) for p in chunk.choices[0].logprobs.content]
    assert found == [("Hel", "Hel"), ("lo", "lo")]


async def test_half_a_character_is_not_sent(served: Site, http: httpx.AsyncClient) -> None:
    def emoji(call: Call) -> None:
        for text in ("", "", "🌍", ""):
            call.channel.push(Delta(text, [1]))
        call.push("", end=True)
        call.channel.end()

    served.backend.script = emoji
    answer = await http.post("/v1/chat/completions", json=chat(stream=True, stream_options={"include_usage": True}))
    found = events(answer.text)
    assert [c["choices"][0]["delta"].get("content") for c in found[:-2]] == ["", "🌍", None]
    assert found[-2]["usage"]["completion_tokens"] == 4


# -- completions


async def test_completion(served: Site, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL.name, prompt="once", stop=["."])
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "Hello wörld 🌍"
    request = served.backend.calls[0].request
    assert (request.prompt, request.sampling.max_tokens, request.sampling.stop) == ("once", 16, ["."])
    stream = await client.completions.create(
        model=MODEL.name, prompt=[1, 2], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert served.backend.calls[1].request.prompt == [1, 2]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "Hello wörld 🌍"
    assert len({c.id for c in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts(served: Site, client: openai.AsyncOpenAI, stream: bool) -> None:
    def answer(call: Call) -> None:
        for index in (0, 1):
            call.push(f"{call.request.prompt}{index}", index=index, end=True, prompt=3 if index == 0 else None)
        call.channel.end()

    served.backend.script = answer
    prompts: Any = ["a", "b", "c"]
    if stream:
        texts = [""] * 6
        usage = None
        async for chunk in await client.completions.create(
            model=MODEL.name, prompt=prompts, n=2, stream=True, stream_options={"include_usage": True}
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
            usage = chunk.usage
    else:
        whole = await client.completions.create(model=MODEL.name, prompt=prompts, n=2)
        texts, usage = [c.text for c in whole.choices], whole.usage
        assert [c.index for c in whole.choices] == list(range(6))
    assert texts == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, 6)


async def test_one_failing_prompt_cancels_the_others(served: Site, http: httpx.AsyncClient) -> None:
    def fail_second(call: Call) -> None:
        if call.request.prompt == "b":
            call.channel.end(RequestError("no b here", param="prompt"))

    served.backend.script = fail_second
    answer = await http.post("/v1/completions", json={"model": MODEL.name, "prompt": ["a", "b", "c"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "no b here"
    first, _, third = served.backend.calls
    assert first.cancelled.is_set()
    assert third.cancelled.is_set()


async def test_completion_logprobs(served: Site, client: openai.AsyncOpenAI) -> None:
    served.backend.script = with_logprobs
    answer = await client.completions.create(model=MODEL.name, prompt="x", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["Hel", "lo"]
    assert logprobs.token_logprobs == [-0.5, -0.5]
    assert logprobs.text_offset == [0, 3]
    assert logprobs.top_logprobs == [{"Hel": -0.5, "ü": -1.5}, {"lo": -0.5, "ü": -1.5}]
    offsets: list[int] = []
    async for chunk in await client.completions.create(model=MODEL.name, prompt="x", logprobs=2, stream=True):
        found = chunk.choices[0].logprobs
        offsets += (found.text_offset or []) if found else []
    assert offsets == [0, 3]


# -- models, health, metrics, documentation


async def test_models(served: Site, client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    (model,) = (await client.models.list()).data
    assert (model.id, model.object, model.created) == (MODEL.name, "model", MODEL.created)
    assert (await client.models.retrieve(MODEL.name)).id == MODEL.name
    assert (await http.get("/v1/models/tiny/model")).json()["max_model_len"] == 4096
    for name in ("unknown", "", "tiny"):
        missing = await http.get(f"/v1/models/{name}")
        assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    served.backend.served = []
    assert (await client.models.list()).data == []


async def test_health_and_live(served: Site, http: httpx.AsyncClient) -> None:
    healthy = await http.get("/health")
    assert (healthy.status_code, healthy.json()["status"], healthy.json()["models"]) == (200, "healthy", [MODEL.name])
    served.backend.broken = "the NATS server has been away for 2 s"
    broken = await http.get("/health")
    served.backend.broken = ""
    assert (broken.status_code, broken.json()["status"]) == (503, "unavailable")
    assert broken.json()["reason"] == "the NATS server has been away for 2 s"
    served.backend.served = []
    starting = await http.get("/health")
    assert (starting.status_code, starting.json()["status"]) == (503, "starting")
    assert (await http.get("/live")).json() == {"status": "live"}


async def test_documentation_and_page(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/openapi.json")).json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "max_completion_tokens" in body["properties"]
    assert "prompt" in json.dumps(schema["paths"]["/v1/completions"])
    assert (await http.get("/docs")).status_code == 200
    page = await http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>" in page.text


async def _metric(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def test_metrics() -> None:
    async with site(hello) as fresh, httpx.AsyncClient(base_url=fresh.url, trust_env=False, verify=False) as http:
        await _check_metrics(http)


async def _check_metrics(http: httpx.AsyncClient) -> None:
    before = (await http.get("/metrics")).text  # what rate() needs to see the first request, and the first failure
    ends = [("success", ""), ("disconnect", ""), ("error", "unavailable"), ("error", "validation")]
    for kind, (status, error) in product(("stream", "unary"), ends):
        labels = f'error_type="{error}",model="tiny/model",request_type="{kind}",status="{status}"'
        assert f'requests_total{{endpoint="chat_completions",{labels}}} 0.0' in before
    for error in ("unavailable", "not_found"):
        labels = f'error_type="{error}",model="",request_type="unary",status="error"'
        assert f'requests_total{{endpoint="completions",{labels}}} 0.0' in before
    assert len(re.findall("^dynamo_frontend_requests_total", before, re.MULTILINE)) == 36
    assert "_created" not in before
    await http.post("/v1/chat/completions", json=chat(stream=True))
    await http.post("/v1/chat/completions", json=chat())
    await http.post("/v1/chat/completions", json=chat(temperature=9))
    await http.post("/v1/chat/completions", json=chat(model="unknown"))
    page = await http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    for kind in ("stream", "unary"):
        labels = f'error_type="",model="tiny/model",request_type="{kind}",status="success"'
        assert f'requests_total{{endpoint="chat_completions",{labels}}} 1.0' in page.text
    for error in ("validation", "not_found"):
        labels = f'error_type="{error}",model="",request_type="unary",status="error"'
        assert f'requests_total{{endpoint="chat_completions",{labels}}} 1.0' in page.text
    assert "unknown" not in page.text
    assert await _metric(http, "dynamo_frontend_inflight_requests") == 0
    assert await _metric(http, "dynamo_frontend_queued_requests") == 0
    assert await _metric(http, "dynamo_frontend_output_tokens_total") == 6
    assert await _metric(http, "dynamo_frontend_output_sequence_tokens_sum") == 6
    assert await _metric(http, "dynamo_frontend_input_sequence_tokens_sum") == 10
    assert await _metric(http, "dynamo_frontend_time_to_first_token_seconds_count") == 1
    assert await _metric(http, "dynamo_frontend_inter_token_latency_seconds_count") >= 2
    assert await _metric(http, "dynamo_frontend_request_duration_seconds_count") == 2


async def test_what_times_measure() -> None:
    """TTFT when the first token comes, however the request ends; the duration of requests that succeed alone."""
    ttft, duration = (f"dynamo_frontend_{name}_seconds_count" for name in ("time_to_first_token", "request_duration"))

    def begin(call: Call) -> None:
        call.push("Hel", prompt=5)

    async with site(begin) as fresh, httpx.AsyncClient(base_url=fresh.url, trust_env=False, verify=False) as http:
        async with http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            assert await _metric(http, ttft) == 1
            fresh.backend.calls[0].channel.end(WorkerLostError("worker lost"))
            assert "worker lost" in "".join([line async for line in lines])
        fresh.backend.script = lambda call: call.channel.end(NoInstancesError("no instance"))
        assert (await http.post("/v1/chat/completions", json=chat(stream=True))).status_code == 503
        assert (await _metric(http, ttft), await _metric(http, duration)) == (1, 0)


# -- errors


def _error(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


BAD: list[tuple[bytes | dict[str, Any], str | None]] = [
    (b"{not json", None),
    (b'{"messages": "\xff"}', None),
    (b"[1]", None),
    (b"", None),
    (b"[" * 5000, None),
    ({"model": MODEL.name}, "messages"),
    (chat(messages=[]), "messages"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages.0.content"),
    (chat(messages=[{"role": "alien", "content": "x"}]), "messages.0.role"),
    (chat(temperature="hot"), "temperature"),
    (chat(temperature=2.5), "temperature"),
    (chat(top_p=0), "top_p"),
    (chat(n=0), "n"),
    (chat(n=1000), "n"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(presence_penalty=3), "presence_penalty"),
    (chat(stop=["a", "b", "c", "d", "e"]), "stop"),
    (chat(stop=[""]), "stop"),
    (chat(top_logprobs=3), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(response_format={"type": "yaml"}), "response_format.type"),
    (chat(stream="yes"), "stream"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
async def test_bad_requests(http: httpx.AsyncClient, body: bytes | dict[str, Any], param: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await http.post("/v1/chat/completions", content=content)
    assert answer.status_code == 400
    error = _error(answer)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param is None or param in error["message"]
    assert not any(word in error["message"].lower() for word in ("pydantic", "orjson", "line 1", "validation error"))


async def test_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "`gpt-5`" in caught.value.message
    assert MODEL.name in caught.value.message


async def test_no_model_ready(served: Site, http: httpx.AsyncClient) -> None:
    served.backend.served = []
    answer = await http.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert _error(answer)["type"] == "server_error"


async def test_the_only_model_needs_no_name(served: Site, http: httpx.AsyncClient) -> None:
    body = chat()
    del body["model"]
    assert (await http.post("/v1/chat/completions", json=body)).json()["model"] == MODEL.name
    served.backend.served = [MODEL, MODEL._replace(name="second")]
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert _error(answer)["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (ContextLengthError("too long", param="messages"), 400, "invalid_request_error", "context_length_exceeded"),
        (ModelNotFoundError("no such model"), 404, "not_found_error", "model_not_found"),
        (OverloadedError("full"), 429, "rate_limit_error", "overloaded"),
        (NoInstancesError("no instance"), 503, "server_error", "unavailable"),
        (EngineError("dead"), 500, "server_error", "engine_error"),
        (ValueError("a bug"), 500, "server_error", "internal_error"),
    ],
)
async def test_errors_before_the_first_token_have_their_status(
    served: Site, http: httpx.AsyncClient, stream: bool, error: Exception, status: int, kind: str, code: str
) -> None:
    served.backend.script = lambda call: call.channel.end(error)
    answer = await http.post("/v1/chat/completions", json=chat(stream=stream))
    assert answer.status_code == status
    assert (_error(answer)["type"], _error(answer)["code"]) == (kind, code)
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert await _metric(http, "dynamo_frontend_inflight_requests") == 0

    def refuse(_: Call) -> None:
        raise error

    served.backend.script = refuse
    assert (await http.post("/v1/chat/completions", json=chat(stream=stream))).status_code == status
    assert await _metric(http, "dynamo_frontend_inflight_requests") == 0
    assert await _metric(http, "dynamo_frontend_queued_requests") == 0


async def test_an_error_inside_a_stream(served: Site, client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    def die(call: Call) -> None:
        call.push("half", prompt=3)
        call.channel.end(WorkerLostError("the worker died", hint="try again"))

    served.backend.script = die
    answer = await http.post("/v1/chat/completions", json=chat(stream=True))
    assert answer.status_code == 200
    found = events(answer.text)
    assert found[-1]["error"]["code"] == "worker_lost"
    assert "[DONE]" not in answer.text
    stream = await client.chat.completions.create(model=MODEL.name, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="the worker died"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_its_end_is_an_error(served: Site, http: httpx.AsyncClient, stream: bool) -> None:
    def stop_short(call: Call) -> None:
        call.push("half", prompt=3)
        call.channel.end()

    served.backend.script = stop_short
    answer = await http.post("/v1/chat/completions", json=chat(stream=stream))
    assert "before it was complete" in answer.text
    assert "[DONE]" not in answer.text
    assert answer.status_code == (200 if stream else 500)


async def test_unknown_urls_and_methods(http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for path in ("/v2/nothing", "/chat/completions", "/v1/chat/completions/", "/v1/"):
        answer = await http.post(path, json=chat())
        assert answer.status_code == 404
        assert _error(answer)["code"] == "unknown_url"
        assert path in _error(answer)["message"]
    assert [record.levelname for record in caplog.records if "Unknown request URL" in record.message] == ["DEBUG"] * 4
    answer = await http.get("/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert "POST" in _error(answer)["message"]
    assert (await http.post("/health")).status_code == 405
    assert (await http.head("/v1/chat/completions")).status_code == 405
    for path in ("/health", "/live", "/metrics", "/v1/models", "/"):
        head = await http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert (await http.options(path)).status_code == 204


async def test_a_bug_is_answered_in_json(
    served: Site, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(served.backend, "models", fail)
    for answer in (await http.get("/v1/models"), await http.post("/v1/chat/completions", json=chat())):
        assert answer.status_code == 500
        assert _error(answer)["message"] == "RuntimeError: a bug"
        assert answer.headers["x-request-id"]
    assert [r.getMessage().partition(" in ")[0] for r in caplog.records if r.levelname == "ERROR"] == [
        "GET /v1/models: 500",
        "chat_completions: 500",
    ]
    assert all(r.exc_info for r in caplog.records if r.levelname == "ERROR")


async def test_body_limit() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    async with site(hello, max_body_bytes=2000) as small, httpx.AsyncClient(trust_env=False, verify=False) as http:
        url = f"{small.url}/v1/chat/completions"
        for content in (b"x" * 2001, chunks()):
            answer = await http.post(url, content=content)
            assert answer.status_code == 413
            assert _error(answer)["code"] == "request_too_large"
        assert (await http.post(url, json=chat())).status_code == 200


async def test_a_large_body(served: Site, http: httpx.AsyncClient) -> None:
    text = "ä" * (10 << 20)
    answer = await http.post(
        "/v1/chat/completions", json=chat(messages=[{"role": "user", "content": text}]), timeout=30
    )
    assert answer.status_code == 200
    assert served.backend.calls[0].request.messages[0]["content"] == text


# -- request ids, unknown fields


async def test_request_ids(served: Site, http: httpx.AsyncClient) -> None:
    for path in ("/health", "/v1/models", "/nothing", "/"):
        assert (await http.get(path)).headers["x-request-id"]
    answer = await http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.json()["id"] == "chatcmpl-abc-1"
    assert served.backend.calls[0].request_id == "abc-1"
    made = set()
    for unusable in (b"", "ü".encode(), b"\xff\xfe", b"a b", b"x" * 500):
        answer = await http.post("/v1/chat/completions", json=chat(), headers=[(b"x-request-id", unusable)])
        assert answer.status_code == 200
        made.add(answer.headers["x-request-id"])
    assert len(made) == 5
    assert all(len(name) == 32 and name.isalnum() for name in made)
    assert (await http.post("/v1/chat/completions", content=b"{")).headers["x-request-id"]


async def test_unknown_fields_are_accepted_with_one_log_line(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    known = {"seed": 1, "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "logit_bias": {}}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            answer = await http.post("/v1/chat/completions", json=chat(**known, frobnicate=1, stream=None))
            assert answer.status_code == 200
    assert [r.getMessage() for r in caplog.records if r.name.startswith("dynamo")] == [
        "request field 'frobnicate' is not known and has no effect"
    ]
    for i in range(200):
        await http.post("/v1/chat/completions", json=chat(**{f"field{i}": 1}))
    assert sum("is not known" in r.getMessage() for r in caplog.records) <= 100


async def test_deadline() -> None:
    from dynamo import context

    left: list[float | None] = []

    def look(call: Call) -> None:
        left.append(context.time_left_s())
        hello(call)

    async with site(look, timeout_s=30) as limited, httpx.AsyncClient(trust_env=False, verify=False) as http:
        await http.post(f"{limited.url}/v1/chat/completions", json=chat())
    assert left[0] is not None
    assert 29 < left[0] <= 30


# -- keys and CORS


async def test_api_keys() -> None:
    async with (
        site(hello, api_keys=["first", "sécond"]) as guarded,
        httpx.AsyncClient(base_url=guarded.url, trust_env=False) as http,
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first"}, {"api-key": "firs"}):
            answer = await http.post("/v1/chat/completions", json=chat(), headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
            error = _error(answer)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert "wrong" not in error["message"]
        assert (await http.get("/v1/models")).status_code == 401
        assert not guarded.backend.calls
        utf8 = [(b"authorization", "Bearer sécond".encode())]
        for good in ({"authorization": "Bearer first"}, {"authorization": "bearer  first"}, {"api-key": "first"}, utf8):
            answer = await http.post("/v1/chat/completions", json=chat(stream=True), headers=good)
            assert answer.status_code == 200
        for path in ("/live", "/health", "/metrics", "/"):
            assert (await http.get(path)).status_code == 200


async def test_cors() -> None:
    ask = {
        "origin": "https://ui.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    async with (
        site(hello, cors_origins=["https://ui.example"], api_keys=["k"]) as shared,
        httpx.AsyncClient(base_url=shared.url, trust_env=False) as http,
    ):
        allowed = await http.options("/v1/chat/completions", headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://ui.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        other = await http.options("/v1/chat/completions", headers={**ask, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        headers = {"origin": "https://ui.example", "authorization": "Bearer k"}
        answer = await http.post("/v1/chat/completions", json=chat(stream=True), headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://ui.example"
        assert answer.headers["access-control-expose-headers"] == "x-request-id"
        assert events(answer.text)[-1] == "[DONE]"
        refused = await http.get("/v1/models", headers={"origin": "https://ui.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://ui.example"


async def test_no_cors_unless_configured(http: httpx.AsyncClient) -> None:
    answer = await http.options("/v1/chat/completions", headers={"origin": "https://ui.example"})
    assert answer.status_code == 204
    assert "access-control-allow-origin" not in answer.headers

"""`HttpService` of the 0.x bindings: functions of this process as models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

import dynamo._core
import dynamo.llm
from dynamo.compat import llm
from dynamo.llm import HttpAsyncEngine, HttpError, HttpService, ModelType
from tests.ports import free_port


class Token(asyncio.Event):
    async def cancelled(self) -> None:
        await self.wait()


async def chunks(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    if request["messages"][-1]["content"] == "tea":
        raise HttpError(418, "I am a teapot")
    for i in range(3):
        yield {"choices": [{"index": 0, "delta": {"content": f"chunk{i}"}, "finish_reason": None}]}


def body(content: str) -> dict[str, Any]:
    return {"model": "mock", "messages": [{"role": "user", "content": content}]}


async def test_models_are_served_until_the_token_is_cancelled() -> None:
    port = free_port()
    service = HttpService(port=port)
    service.add_chat_completions_model("mock", HttpAsyncEngine(chunks, asyncio.get_running_loop()))
    assert (service.list_chat_completions_models(), service.list_completions_models()) == (["mock"], [])
    with pytest.raises(ValueError, match="Model already exists: mock"):
        service.add_chat_completions_model("mock", HttpAsyncEngine(chunks))
    token = Token()
    running = service.run(token)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        while not running.done():
            try:
                models = (await client.get("/v1/models")).json()
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
        assert [model["id"] for model in models["data"]] == ["mock"]
        answer = await client.post("/v1/chat/completions", json=body("hi"))
        assert answer.json()["choices"][0]["message"]["content"] == "chunk0chunk1chunk2"
        streamed = await client.post("/v1/chat/completions", json=body("hi") | {"stream": True})
        assert streamed.text.count("data: ") == 4
        assert streamed.text.endswith("data: [DONE]\n\n")
        refused = await client.post("/v1/chat/completions", json=body("tea"))
        assert refused.status_code == 418
        assert refused.json()["error"]["message"] == "I am a teapot"
        other = await client.post("/v1/completions", json={"model": "mock", "prompt": "x"})
        assert other.status_code == 404
        service.remove_chat_completions_model("mock")
        assert (await client.get("/v1/models")).json()["data"] == []
    token.set()
    await asyncio.wait_for(running, 20)
    with pytest.raises(ValueError, match="Model not found: mock"):
        service.remove_chat_completions_model("mock")


def test_the_door_has_what_is_behind_it() -> None:
    names = ("HttpAsyncEngine", "HttpError", "HttpService", "ModelType", "RouterMode", "register_llm")
    assert all(getattr(door, name) is getattr(llm, name) for door in (dynamo.llm, dynamo._core) for name in names)
    assert (ModelType.Chat, ModelType.Completion, ModelType.Backend, ModelType.Embedding) == (1, 2, 3, 4)
    with pytest.raises(ImportError, match="no_such_name"):
        from dynamo.llm import no_such_name  # type: ignore[attr-defined]  # noqa: F401

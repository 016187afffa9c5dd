"""A scripted backend, and a real uvicorn server in front of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo.http.server import HttpServer
from dynamo.llm.protocol import ChatRequest, CompletionRequest, Delta, ServedModel
from dynamo.log import request_id
from dynamo.openai.app import create_app
from dynamo.streams import Channel, Stream
from tests.ports import free_port

MODEL = ServedModel("tiny/model", "dynamo-tiny", 4096, 1_700_000_000)


@dataclass
class Call:
    """One call of the backend: its request, and the channel that the test writes to."""

    request: Any
    channel: Channel[Delta] = field(default_factory=Channel)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    request_id: str = ""

    def push(self, text: str, *, index: int = 0, end: bool = False, prompt: int | None = None, **more: Any) -> None:
        tokens = [1] if text else []
        self.channel.push(Delta(text, tokens, index, "stop" if end else None, None, prompt, **more))

    def say(self, *texts: str, prompt: int = 5, reason: str = "length") -> None:
        """Push a complete response of one choice, one token for each text, and end the stream."""
        for i, text in enumerate(texts):
            last = i == len(texts) - 1
            finish: Any = reason if last else None
            self.channel.push(Delta(text, [i], 0, finish, None, prompt if i == 0 else None, 2 if i == 0 else None))
        self.channel.end()


class FakeBackend:
    """A backend whose `script` answers each call; without one, the test gets each call from `next_call` and answers it."""

    def __init__(self, script: Callable[[Call], None] | None = None) -> None:
        self.script = script
        self.served: list[ServedModel] = [MODEL]
        self.calls: list[Call] = []
        self.broken = ""
        self._new: asyncio.Queue[Call] = asyncio.Queue()

    def _called(self, request: Any) -> Stream[Delta]:
        call = Call(request, request_id=request_id.get())
        call.channel.on_cancel = call.cancelled.set
        self.calls.append(call)
        self._new.put_nowait(call)
        stream = Stream(call.channel)
        if self.script is not None:
            self.script(call)
        return stream

    async def next_call(self) -> Call:
        return await asyncio.wait_for(self._new.get(), 5)

    def chat(self, request: ChatRequest) -> Stream[Delta]:
        return self._called(request)

    def completion(self, request: CompletionRequest) -> Stream[Delta]:
        return self._called(request)

    def forward(self, api: str, request: dict[str, Any]) -> Stream[Any]:
        return self._called(request)

    def models(self) -> list[ServedModel]:
        return self.served

    def instance_counts(self) -> dict[str, int]:
        return {"Processor": len(self.served)}

    def unavailable_reason(self) -> str:
        return self.broken


def without_direct(app: ASGIApp) -> ASGIApp:
    """Wrap `send`, so that the transport cannot be reached, as under servers other than uvicorn."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        async def plain(message: Message) -> None:
            await send(message)

        await app(scope, receive, plain)

    return outer


@dataclass
class Site:
    """A running server and its backend."""

    url: str
    port: int
    backend: FakeBackend
    server: HttpServer


@asynccontextmanager
async def site(
    script: Callable[[Call], None] | None = None,
    *,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    **options: Any,
) -> AsyncIterator[Site]:
    backend = FakeBackend(script)
    server = HttpServer(
        around(create_app(backend, unavailable_reason=backend.unavailable_reason, **options)), "127.0.0.1", free_port()
    )
    await server.start()
    try:
        yield Site(server.url, server.port, backend, server)
    finally:
        for call in backend.calls:
            call.channel.cancel()
        await server.stop()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL.name, "messages": [{"role": "user", "content": "hi"}], **fields}


def post(path: str, body: dict[str, Any] | bytes, *headers: str, version: str = "1.1") -> bytes:
    """Return a request as bytes, for a raw socket."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "host: test", f"content-length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def events(body: str) -> list[Any]:
    """Return the events of a whole stream, decoded, `[DONE]` as text. Fails on all but `data:` and comments."""
    found: list[Any] = []
    assert body.endswith("\n\n")
    for block in body[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        assert "\n" not in block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found

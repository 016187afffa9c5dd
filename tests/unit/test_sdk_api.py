"""`@api`: what it marks, and what a client of the mounted application sees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI, Query
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from dynamo.config.settings import constructor_arguments, declared
from dynamo.errors import ConfigError, GraphError, OverloadedError, StartError
from dynamo.http.api_app import Answer, create_api, listen
from dynamo.sdk import DynamoTransport, Stream, api, endpoint, liveness, readiness, service
from dynamo.sdk.api import Route, routes
from dynamo.sdk.spec import spec_of
from dynamo.streams import Channel
from dynamo.worker.http_service import DEFAULT_CHECKS, HttpService, claim, http_address


class Ask(BaseModel):
    text: str


@dataclass
class Item:
    n: int


class Packed(msgspec.Struct):
    n: int


def stream_of(*items: Any, error: Exception | None = None) -> Stream[Any]:
    channel: Channel[Any] = Channel()
    for item in items:
        channel.push(item)
    channel.end(error)
    return Stream(channel)


@service
class Frontend:
    closed = 0

    @api
    async def plain(self, request: Ask) -> dict[str, str]:
        return {"text": request.text}

    @api(name="many/kinds")
    async def kinds(self, request: Ask) -> list[Any]:
        return [Item(1), Packed(2), Ask(text="3"), None]

    @api()
    def blocking(self, request: Ask) -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return request.text

    @api
    async def words(self, text):  # type: ignore[no-untyped-def]
        for word in text.split():
            yield word + " "

    @api
    async def scaled(self, number: int, by: float = 2.0) -> float:
        return number * by

    @api
    async def queried(self, number: int = Query(alias="n")) -> int:
        return number

    @api(name="users/{user}", http_method="get")
    async def user(self, user: str) -> str:
        return user

    @api
    async def items(self, request: Ask) -> AsyncIterator[Any]:
        yield Item(1)
        yield Packed(2)

    @api
    def generated(self, request: Ask) -> Iterator[str]:
        yield from request.text

    @api
    def piped(self, request: Ask) -> Stream[str]:
        return stream_of("a", "b")

    @api
    async def nothing(self, request: Ask) -> AsyncIterator[str]:
        for _ in ():
            yield ""

    @api
    def fails_first(self, request: Ask) -> Stream[str]:
        return stream_of(error=OverloadedError("full", hint="wait"))

    @api
    def fails_later(self, request: Ask) -> Stream[Item]:
        return stream_of(Item(1), error=OverloadedError("full"))

    @api
    async def own_response(self, request: Ask) -> PlainTextResponse:
        return PlainTextResponse("mine", 418)

    @api
    async def endless(self, request: Ask) -> AsyncIterator[str]:
        try:
            while True:
                yield "x"
                await asyncio.sleep(0.001)
        finally:
            Frontend.closed += 1


def application(target: type[Any] = Frontend, app: Any = None) -> Any:
    answers = [Answer(r.path, r.verb, getattr(target(), r.method)) for r in spec_of(target).routes]

    async def check() -> tuple[int, str]:
        return 503, "no"

    return create_api(app, target.__name__, answers, {"/readyz": check})


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("plain", {"text": "x"}, 200, '{"text":"x"}'),
        ("many/kinds", {"text": "x"}, 200, '[{"n":1},{"n":2},{"text":"3"},null]'),
        ("blocking", {"text": "x"}, 200, '"x"'),
        ("words", {"text": "a b"}, 200, "a b "),
        ("scaled", {"number": 3}, 200, "6.0"),
        ("scaled?number=4", {"by": 0.5}, 200, "2.0"),
        ("scaled?number=4&by=3", None, 200, "12.0"),
        ("queried?n=5", None, 200, "5"),
        ("items", {"text": "x"}, 200, 'data: {"n":1}\n\ndata: {"n":2}\n\n'),
        ("generated", {"text": "ab"}, 200, "ab"),
        ("piped", {"text": "x"}, 200, "ab"),
        ("nothing", {"text": "x"}, 200, ""),
        ("own_response", {"text": "x"}, 418, "mine"),
    ],
)
async def test_answers(client: httpx.AsyncClient, path: str, body: Any, status: int, text: str) -> None:
    answer = await client.post(f"/{path}", json=body)
    assert (answer.status_code, answer.text) == (status, text)
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize("path", ["plain", "words", "scaled", "items"])
async def test_bodies_that_do_not_fit(client: httpx.AsyncClient, path: str) -> None:
    for content in (b'{"other": 1}', b'{"text": [], "number": "x"', b'{"number": "x"}', b"[]"):
        answer = await client.post(f"/{path}", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"][0] == "body"


async def test_other_verbs_and_paths(client: httpx.AsyncClient) -> None:
    assert (await client.get("/users/me")).json() == "me"
    assert (await client.get("/plain")).status_code == 405
    assert (await client.post("/users/me")).status_code == 405
    assert (await client.get("/readyz")).text == "no"
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/plain", "/users/{user}", "/many/kinds", "/scaled"} <= paths.keys()
    assert "/readyz" not in paths


async def test_errors(client: httpx.AsyncClient) -> None:
    answer = await client.post("/fails_first", json={"text": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["message"] == "full (wait)"
    later = (await client.post("/fails_later", json={"text": "x"})).text
    assert later.startswith('data: {"n":1}\n\nevent: error\ndata: {"error":')


async def test_a_client_that_leaves_closes_the_generator() -> None:
    sent: list[bytes] = []
    body = [b'{"text": "x"}']
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) > 5:
            left.set()

    scope = {
        "type": "http", "method": "POST", "path": "/endless", "query_string": b"", "http_version": "1.1",
        "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
    before = Frontend.closed
    await asyncio.wait_for(application()(scope, receive, send), 5)
    assert Frontend.closed == before + 1


async def test_the_authors_own_application() -> None:
    own = FastAPI(title="mine")

    @own.get("/readyz")
    async def ready() -> str:
        return "own"

    async with httpx.AsyncClient(transport=httpx.ASGITransport(application(app=own)), base_url="http://api") as client:
        assert (await client.get("/readyz")).json() == "own"
        assert (await client.post("/plain", json={"text": "x"})).status_code == 200
        assert (await client.get("/openapi.json")).json()["info"]["title"] == "mine"
    with pytest.raises(GraphError, match="app is a function, which cannot take @api methods"):
        application(app=lambda scope, receive, send: None)


# -- marks


def test_routes_are_inherited_and_can_be_ended() -> None:
    class Base:
        @api
        def one(self) -> None: ...

        @api(name="/second")
        def two(self) -> None: ...

    class ManagedProcess(Base):
        def one(self) -> None: ...

        two = None  # type: ignore[assignment]

        @endpoint(name="x/y", transports=[DynamoTransport.HTTP])
        def three(self, a: int, b: int) -> None: ...

        @endpoint(is_api=True)
        def four(self) -> None: ...

    assert routes(ManagedProcess) == [
        Route("/one", "POST", "one"), Route("/x/y", "POST", "three"), Route("/four", "POST", "four")
    ]  # fmt: skip
    assert routes(Base)[1] == Route("/second", "POST", "two")
    assert spec_of(service(ManagedProcess)).endpoints == {}


def test_what_api_refuses() -> None:
    with pytest.raises(GraphError, match="goes on a method"):
        api(int)
    for name in ("a b", "a?b"):
        with pytest.raises(GraphError, match="is not a valid path"):
            api(name=name)(lambda self: None)
    with pytest.raises(GraphError, match="expected one of GET"):
        api(http_method="FETCH")(lambda self: None)
    with pytest.raises(ValueError, match="http_method can only be specified for endpoints with HTTP transport"):
        endpoint(http_method="GET")

    class Twice:
        @api(name="x")
        def one(self) -> None: ...

        @api(name="/x")
        def two(self) -> None: ...

    with pytest.raises(GraphError, match=r"Twice.two: POST /x is already served by Twice.one"):
        service(Twice)


# -- where it listens


def test_host_and_port_are_settings_of_an_http_service() -> None:
    @service
    class Named:
        def __init__(self, message: str = "") -> None: ...

        @api
        async def run(self) -> None: ...

    found = declared(Named)
    assert found is not None
    assert found.takes("port")
    assert found.takes("message")
    assert not found.takes("prot")
    assert constructor_arguments(Named, {"port": 1, "message": "m"}) == {"message": "m"}
    frontend = declared(Frontend)
    assert frontend is None  # no constructor: takes any key


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        def __init__(self, port: int = 7000) -> None: ...

    for name in ("DYNAMO_HOST", "DYNAMO_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert http_address(Frontend, {}, entry=True) == ("127.0.0.1", 8000)
    assert http_address(Frontend, {}, entry=False) == ("127.0.0.1", None)
    assert http_address(Own, {}, entry=False) == ("127.0.0.1", 7000)
    monkeypatch.setenv("DYNAMO_PORT", "9000")
    monkeypatch.setenv("DYNAMO_HOST", "::1")
    assert http_address(Own, {}, entry=True) == ("::1", 9000)
    assert http_address(Frontend, {}, entry=False) == ("127.0.0.1", None)
    assert http_address(Frontend, {"port": "81", "host": "h"}, entry=True) == ("h", 81)
    for wrong in ("x", -1, 70000, []):
        with pytest.raises(ConfigError, match=r"Frontend.port: expected a port number"):
            http_address(Frontend, {"port": wrong}, entry=True)


def test_claims(tmp_path: Any) -> None:
    """Workers share, a restart gets the same port again, services do not share."""
    ports = tmp_path / "ports"

    def bind(port: int | None, shared: bool) -> Any:
        return listen("127.0.0.1", port, shared=shared)

    one = claim(ports, "A", None, bind, True)
    number = one.getsockname()[1]
    two = claim(ports, "A", None, bind, True)
    assert two.getsockname()[1] == number
    with pytest.raises(StartError, match=f"B cannot listen on port {number}: A uses it"):
        claim(ports, "B", number, bind, True)
    one.close()
    two.close()
    again = claim(ports, "A", None, bind, True)
    assert again.getsockname()[1] == number
    with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{number}"):
        claim(tmp_path / "other graph", "C", number, bind, True)
    again.close()


# -- probes


async def test_health_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    @service
    class Probed:
        well: bool | None = True

        @liveness
        async def alive(self) -> bool:
            return True

        @liveness(route="/custom/health")
        def custom(self) -> bool:
            if self.well is None:
                raise OSError("no disk")
            return self.well

    probed = Probed()
    http = HttpService(probed, {}, entry=True, workers=1, run_dir=None, metrics=bytes)
    checks = http._checks()
    assert list(checks) == ["/healthz", "/custom/health"]
    assert await checks["/custom/health"]() == (200, "starting")
    http.starting = False
    assert [await check() for check in checks.values()] == [(200, "ok")] * 2
    probed.well = False
    assert await checks["/custom/health"]() == (503, "Probed.custom returned False")
    probed.well = None
    assert await checks["/custom/health"]() == (500, "Probed.custom: OSError: no disk")
    assert await checks["/healthz"]() == (200, "ok")
    monkeypatch.setenv(DEFAULT_CHECKS, "true")
    assert list(http._checks()) == ["/healthz", "/custom/health", "/readyz"]
    monkeypatch.setenv(DEFAULT_CHECKS, "perhaps")
    with pytest.raises(ConfigError, match="DEFAULT_HEALTH_CHECKS: expected a yes or a no, found 'perhaps'"):
        http._checks()


async def test_not_ready_while_starting() -> None:
    @service
    class Waiting:
        @readiness
        def ready(self) -> bool:
            return True

    http = HttpService(Waiting(), {}, entry=False, workers=1, run_dir=None, metrics=bytes)
    assert await http._checks()["/readyz"]() == (503, "not ready: starting or stopping")
    assert await http.start() is None  # no @api, no server

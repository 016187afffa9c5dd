"""`@api`: the marks on a service, and the HTTP behaviour of the mounted application."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI, Form, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException as StarletteHTTPException

from dynamo.config.settings import constructor_arguments, declared
from dynamo.errors import ConfigError, GraphError, OverloadedError, StartError
from dynamo.http.api_app import BoundRoute, create_api
from dynamo.http.server import listen
from dynamo.sdk import DynamoTransport, Stream, api, endpoint, liveness, readiness, service
from dynamo.sdk.api import Route, routes
from dynamo.sdk.spec import spec_of
from dynamo.streams import Channel
from dynamo.worker.http_service import DEFAULT_CHECKS, HttpService, claim, http_address

JSON = {"content-type": "application/json"}


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
    async def form(self, text: str = Form()) -> str:
        return text

    @api
    async def raw(self, request: Request) -> dict[str, Any]:
        return dict(await request.form())

    @api
    async def refuses(self, kind: str) -> None:
        if kind == "text":
            raise HTTPException(409, "it exists", {"x-own": "1"})
        if kind == "value":
            raise HTTPException(404, {"reason": 5})
        if kind == "empty":
            raise HTTPException(304)
        raise KeyError(kind)

    @api
    async def breaks_off(self, request: Ask) -> AsyncIterator[str]:
        yield "half"
        raise KeyError("later")

    @api
    async def endless(self, request: Ask) -> AsyncIterator[str]:
        try:
            while True:
                yield "x"
                await asyncio.sleep(0.001)
        finally:
            Frontend.closed += 1


def application(target: type[Any] = Frontend, app: Any = None) -> Any:
    bound = [BoundRoute(r.path, r.verb, getattr(target(), r.method)) for r in spec_of(target).routes]

    async def check() -> tuple[int, str]:
        return 503, "no"

    return create_api(app, target.__name__, bound, {"/readyz": check})


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
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("invalid_request_error", None)
        assert re.match(r"Invalid request: (body\b|the body is not JSON: )", error["message"])


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return OpenAI's error object, after a check that the response has nothing else."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


async def test_a_validation_error_names_each_field(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/plain", json={"other": 1}))
    assert (error["param"], error["message"]) == ("text", "Invalid request: body.text: Field required")
    error = error_of(await client.post("/scaled", json={"number": "x"}))
    assert error["param"] == "number"
    assert "body.number: Input should be a valid integer" in error["message"]
    error = error_of(await client.post("/queried?n=x"))
    assert (error["param"], error["message"][:25]) == ("n", "Invalid request: query.n:")
    assert error_of(await client.post("/plain", content=b"{", headers=JSON))["param"] is None


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "application/json; charset=utf-8"])
@pytest.mark.parametrize(("path", "text"), [("plain", '{"text":"x"}'), ("words", "x ")])
async def test_a_json_body_needs_no_content_type(
    client: httpx.AsyncClient, path: str, text: str, content_type: str | None
) -> None:
    """`curl -d` calls its body a form."""
    headers = {} if content_type is None else {"content-type": content_type}
    answer = await client.post(f"/{path}", content=b'{"text": "x"}', headers=headers)
    assert (answer.status_code, answer.text) == (200, text)


async def test_a_form_is_still_a_form(client: httpx.AsyncClient) -> None:
    assert (await client.post("/form", data={"text": "a=b"})).json() == "a=b"
    assert (await client.post("/raw", data={"text": "a=b"})).json() == {"text": "a=b"}
    assert (await client.post("/plain", content=b"text", headers={"content-type": "text/plain"})).status_code == 422


async def test_other_verbs_and_paths(client: httpx.AsyncClient) -> None:
    assert (await client.get("/users/me")).json() == "me"
    assert (await client.get("/plain")).status_code == 405
    assert (await client.post("/users/me")).status_code == 405
    assert (await client.get("/readyz")).text == "no"
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/plain", "/users/{user}", "/many/kinds", "/scaled"} <= paths.keys()
    assert paths["/plain"]["post"]["responses"].keys() == {"200", "default"}
    assert "/readyz" not in paths


async def test_errors(client: httpx.AsyncClient) -> None:
    answer = await client.post("/fails_first", json={"text": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["message"] == "full (wait)"
    later = (await client.post("/fails_later", json={"text": "x"})).text
    assert later.startswith('data: {"n":1}\n\nevent: error\ndata: {"error":')


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    missing = await client.get("/plan")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "unknown_url"
    assert error_of(missing)["message"] == "Unknown request URL: GET /plan. See /docs."
    wrong = await client.get("/plain")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert error_of(wrong)["message"] == "GET is not allowed on /plain; use POST."
    assert (await client.options("/plain")).status_code == 405


async def test_exceptions_of_a_method(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    conflict = await client.post("/refuses", json={"kind": "text"})
    assert (conflict.status_code, conflict.headers["x-own"]) == (409, "1")
    assert error_of(conflict) == {
        "message": "it exists", "type": "invalid_request_error", "param": None, "code": None
    }  # fmt: skip
    missing = await client.post("/refuses", json={"kind": "value"})
    assert (missing.status_code, error_of(missing)["message"]) == (404, '{"reason": 5}')
    assert (await client.post("/refuses", json={"kind": "empty"})).content == b""
    assert re.search(r"POST /refuses: 409 in \d\.\d{3} s: it exists", caplog.text)
    caplog.clear()
    broken = await client.post("/refuses", json={"kind": "bug"})
    assert broken.status_code == 500
    assert len(broken.headers["x-request-id"]) == 32
    assert error_of(broken) == {
        "message": "KeyError: 'bug'", "type": "server_error", "param": None, "code": "internal_error"
    }  # fmt: skip
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.getMessage().startswith("POST /refuses: 500 in")
    assert record.exc_info
    assert "raise KeyError(kind)" in caplog.text


async def test_a_bug_after_the_first_text_names_its_place(client: httpx.AsyncClient) -> None:
    app = application()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"text": "x"}', "more_body": False}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http", "method": "POST", "path": "/breaks_off", "query_string": b"", "http_version": "1.1",
        "headers": [], "asgi": {"version": "3.0", "spec_version": "2.4"},
    }  # fmt: skip
    with pytest.raises(KeyError) as caught:
        await app(scope, receive, send)
    assert caught.value.__notes__ == ["while answering POST /breaks_off"]


@pytest.mark.parametrize("app", [Starlette(), FastAPI(), None])
async def test_every_application_has_the_same_errors(app: Any) -> None:
    transport = httpx.ASGITransport(create_api(app, "any", [], {}), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        answer = await client.get("/nothing")
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_url")


async def test_an_application_that_fails_by_itself_is_answered_in_json(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("no luck \ud800")

    transport = httpx.ASGITransport(create_api(app, "any", [], {}), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        answer = await client.get("/x")
        assert (answer.status_code, error_of(answer)["message"]) == (500, "RuntimeError: no luck ?")
    assert "GET /x: 500 in" in caplog.text


async def test_a_failure_is_logged_with_the_time_since_the_request_arrived(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = FastAPI()

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(0.05)
        raise OverloadedError("too many")

    transport = httpx.ASGITransport(create_api(app, "any", [], {}))
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        await client.get("/slow")
    (duration_s,) = re.findall(r"GET /slow: \d+ in (\S+) s: too many", caplog.text)
    assert float(duration_s) >= 0.05


async def test_a_background_task_that_fails_keeps_the_status_of_the_response(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()

    async def fail() -> None:
        raise RuntimeError("no disk")

    @app.get("/x")
    async def answer() -> PlainTextResponse:
        return PlainTextResponse("done", background=BackgroundTask(fail))

    transport = httpx.ASGITransport(create_api(app, "any", [], {}))
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        assert (await client.get("/x")).text == "done"
    assert "GET /x: 200 in" in caplog.text
    assert "RuntimeError: no disk" in caplog.text


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


async def test_the_authors_own_exception_handlers(caplog: pytest.LogCaptureFixture) -> None:
    own = FastAPI()

    def answer(text: str) -> Any:
        return lambda request, error: PlainTextResponse(text, 499)

    for kind, text in (
        (StarletteHTTPException, "http"), (RequestValidationError, "validation"), (OverloadedError, "overloaded"),
        (Exception, "bug"),
    ):  # fmt: skip
        own.add_exception_handler(kind, answer(text))
    transport = httpx.ASGITransport(application(app=own), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        answers = [
            await client.get("/nothing"),
            await client.post("/plain", json={}),
            await client.post("/fails_first", json={"text": "x"}),
            await client.post("/refuses", json={"kind": "bug"}),
        ]
    assert [(a.status_code, a.text) for a in answers] == [
        (499, "http"), (499, "validation"), (499, "overloaded"), (499, "bug")
    ]  # fmt: skip
    assert caplog.text.count("Traceback") == 1


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


def test_invalid_uses_of_api() -> None:
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

    for name in ("DYNAMO_HOST", "DYNAMO_PORT", "DYN_DEFAULT_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert http_address(Frontend, {}, entry=True) == ("127.0.0.1", 8000)
    monkeypatch.setenv("DYN_DEFAULT_HOST", "0.0.0.0")
    assert http_address(Frontend, {}, entry=True) == ("0.0.0.0", 8000)
    assert http_address(Frontend, {"host": "h"}, entry=True) == ("h", 8000)
    assert http_address(Frontend, {}, entry=False) == ("127.0.0.1", None)
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

"""Declarations: `@service`, `@endpoint`, the hooks, and what they refuse."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest

from dynamo.errors import GraphError
from dynamo.sdk import (
    Reply,
    Service,
    Stream,
    api,
    arguments,
    async_on_shutdown,
    async_on_start,
    depends,
    endpoint,
    liveness,
    on_shutdown,
    readiness,
    service,
)
from dynamo.sdk.endpoint import hooks
from dynamo.sdk.service import parse_envs
from dynamo.sdk.spec import Resources, is_service, spec_of


@dataclass
class Ask:
    text: str


@service(dynamo={"namespace": "ns", "component_type": "worker"}, resources={"gpu": "2", "cpu": 4}, workers=3, image="i")
class Worker:
    """Every kind of endpoint and hook."""

    @endpoint
    async def one(self, ask: Ask) -> int:
        return 1

    @endpoint()
    async def many(self, ask: Ask) -> AsyncIterator[str]:
        yield "a"

    @endpoint(name="chat/completions", transports=[])
    def piped(self, ask: Ask) -> Stream[float]:
        raise NotImplementedError

    @endpoint
    def passed_on(self) -> Reply[bytes]:
        raise NotImplementedError

    @endpoint
    async def untyped(self, ask):  # type: ignore[no-untyped-def]
        return ask

    @async_on_start
    async def start(self) -> None: ...

    @on_shutdown()
    def stop(self) -> None: ...

    @liveness
    @readiness
    def well(self) -> bool:
        return True


def test_the_class_comes_back_with_its_declaration() -> None:
    assert isinstance(Worker, type)
    spec = spec_of(Worker)
    assert (spec.name, spec.namespace, spec.component_type) == ("Worker", "ns", "worker")
    assert spec.resources == Resources(2.0, "4", "500Mi")
    assert (spec.workers, spec.image, spec.address) == (3, "i", ("ns", "Worker"))
    assert Worker.dynamo_address() == ("ns", "Worker")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "name", "streaming", "types", "parameter"),
    [
        ("one", "one", False, (Ask, int), "ask"),
        ("many", "many", True, (Ask, str), "ask"),
        ("piped", "chat/completions", True, (Ask, float), "ask"),
        ("passed_on", "passed_on", True, (Any, bytes), None),
        ("untyped", "untyped", False, (Any, Any), "ask"),
    ],
)
def test_kinds_of_endpoints(method: str, name: str, streaming: bool, types: Any, parameter: str | None) -> None:
    spec = spec_of(Worker).endpoints[method]
    assert (spec.name, spec.method, spec.streaming) == (name, method, streaming)
    assert spec.types() == types
    assert spec.parameter == parameter


async def test_bare_decorator_and_plain_use() -> None:
    @service
    class Plain:
        @endpoint
        async def run(self, n: int) -> int:
            return n + 1

    assert spec_of(Plain).namespace == "dynamo"
    assert is_service(Plain)
    assert not is_service(Plain())
    assert await Plain().run(1) == 2


def test_inheritance_of_endpoints_and_hooks() -> None:
    class Base:
        @endpoint(name="address")
        async def run(self, n: int) -> int:
            return n

        @endpoint
        async def removed(self, n: int) -> int:
            return n

        @async_on_start
        def first(self) -> None: ...

        @async_on_shutdown
        async def last(self) -> None: ...

        @async_on_start
        def off(self) -> None: ...

    @service
    class ManagedProcess(Base):
        async def run(self, n: str) -> AsyncIterator[bytes]:  # type: ignore[override]
            yield b""

        removed = None  # type: ignore[assignment]

        def first(self) -> None: ...

        off = None  # type: ignore[assignment]

        @async_on_start
        async def second(self) -> None: ...

    (spec,) = spec_of(ManagedProcess).endpoints.values()
    assert (spec.name, spec.method, spec.streaming, spec.types()) == ("address", "run", True, (str, bytes))
    assert hooks(ManagedProcess, "start") == ["first", "second"]
    assert hooks(ManagedProcess, "shutdown") == ["last"]
    assert hooks(ManagedProcess, "liveness") == []


def test_a_subclass_is_a_service_only_when_decorated() -> None:
    class Sub(Worker):
        pass

    assert not is_service(Sub)
    with pytest.raises(GraphError, match="Sub is not a service"):
        spec_of(Sub)
    with pytest.raises(GraphError, match="None is not a service"):
        spec_of(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dynamoo": {}}, "unknown argument 'dynamoo'\nhint: did you mean dynamo"),
        ({"worker": 2}, "unknown argument 'worker'\nhint: did you mean workers"),
        ({"workers": "two"}, "at least 1, found 'two'"),
        ({"workers": "0"}, "at least 1, found '0'"),
        ({"workers": 0}, "at least 1, found 0"),
        ({"workers": True}, "found True"),
        ({"resources": {"gpu": "many"}}, "resources.gpu: expected a number, found 'many'"),
        ({"dynamo": {"namespace": "a b"}}, "namespace 'a b'"),
        ({"dynamo": {"namespace": "a/b"}}, "namespace 'a/b'"),
        ({"dynamo": {"namespace": 5}}, "namespace 5"),
        ({"envs": [{"key": 1}]}, "envs: expected"),
    ],
)
def test_service_refuses(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        service(**arguments)(type("S", (), {}))


Declare = Callable[..., object]


def _service(**given: Any) -> object:
    return service(**given)(type("S", (), {}))


def _endpoint(**given: Any) -> object:
    @endpoint(**given)
    async def generate(self: object, request: str) -> str:
        return request

    return generate


def _api(**given: Any) -> object:
    @api(**given)
    async def generate() -> str:
        return ""

    return generate


def _depends(**given: Any) -> object:
    return depends(on=Worker, **given)


@pytest.mark.parametrize(
    ("declare", "where", "names"),
    [
        (
            _service,
            "@service",
            ("traffic", "resource", "labels", "dependencies", "http_exposed", "name", "metrics", "zzz"),
        ),
        (_endpoint, "@endpoint", ("http_exposed", "is_stream", "timeout")),
        (_api, "@api", ("transports", "is_api", "route")),
        (_depends, "depends()", ("url", "deployment", "cluster")),
    ],
)
def test_unknown_arguments_are_warned_of_once(
    declare: Declare, where: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for name in names:
                declare(**{name: []})
    assert [str(w.message).partition(";")[0] for w in caught] == [f"{where}: {name!r} has no effect" for name in names]
    assert {(w.category, w.filename) for w in caught} == {(arguments.IgnoredArgumentWarning, __file__)}


@pytest.mark.parametrize(
    ("declare", "name", "near"),
    [
        (_service, "worker", "workers"),
        (_service, "env", "envs"),
        (_endpoint, "nam", "name"),
        (_endpoint, "transport", "transports"),
        (_api, "http_methods", "http_method"),
        (_depends, "optionl", "optional"),
    ],
)
def test_a_misspelled_argument_is_an_error(declare: Declare, name: str, near: str) -> None:
    with pytest.raises(GraphError, match=f"unknown argument '{name}'\nhint: did you mean {near}\\?"):
        declare(**{name: 1})


def test_a_number_of_workers_may_be_text() -> None:
    assert spec_of(cast("type[Any]", _service(workers="2"))).workers == 2


def test_endpoint_and_api_take_their_name_without_a_keyword() -> None:
    @service
    class Named:
        @endpoint("chat/completions")
        async def generate(self, request: str) -> str:
            return request

        @api("v1/models", http_method="GET")
        async def models(self) -> list[str]:
            return []

    spec = spec_of(Named)
    assert [e.name for e in spec.endpoints.values()] == ["chat/completions"]
    assert [(r.verb, r.path) for r in spec.routes] == [("GET", "/v1/models")]


def test_service_goes_on_classes_and_endpoint_on_methods() -> None:
    with pytest.raises(GraphError, match="goes on a class"):
        service(lambda: None)  # type: ignore[type-var]
    with pytest.raises(GraphError, match="goes on a method"):
        endpoint(int)
    with pytest.raises(GraphError, match="goes on a method"):
        endpoint(staticmethod(len))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a.b", "a*", "/a", "a/", "a//b", "é"])
def test_endpoint_names_that_cannot_be(name: str) -> None:
    with pytest.raises(GraphError, match="letters, digits"):
        endpoint(name=name)(lambda self, request: None)


def test_endpoints_take_one_request() -> None:
    async def two(self: Any, a: int, b: int) -> None: ...
    async def optional(self: Any, a: int, b: int = 0, *args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(GraphError, match="two takes several parameters"):
        endpoint(two)
    endpoint(optional)


def test_two_endpoints_of_one_name() -> None:
    with pytest.raises(GraphError, match="another endpoint already has the name 'run'"):

        @service
        class Twice:
            @endpoint
            async def run(self, n: int) -> int:
                return n

            @endpoint(name="run")
            async def other(self, n: int) -> int:
                return n


def test_annotation_that_cannot_be_resolved() -> None:
    @endpoint
    async def run(self: Any, n: Missing) -> int:  # type: ignore[name-defined] # noqa: F821
        return 1

    spec = run.__dynamo_endpoint__  # type: ignore[attr-defined]
    with pytest.raises(GraphError, match=r"annotation cannot be resolved: .*Missing"):
        spec.types()


def test_awaitable_annotation() -> None:
    @endpoint
    def run(self: Any, n: int) -> Awaitable[str]:
        raise NotImplementedError

    assert run.__dynamo_endpoint__.types() == (int, str)  # type: ignore[attr-defined]


def test_envs() -> None:
    assert parse_envs({"A": 1}) == parse_envs([{"name": "A", "value": 1}]) == {"A": "1"}
    assert parse_envs(None) == {}


def test_service_base_gives_link_to_type_checkers_only() -> None:
    @service
    class Own(Service):
        pass

    assert Own.link.__func__ is Worker.link.__func__  # type: ignore[attr-defined]

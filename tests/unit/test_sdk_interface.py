"""Interfaces, and what stood in a service class's place in ai-dynamo 0.1 to 0.3."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dynamo.errors import GraphError
from dynamo.sdk import (
    AbstractDynamoService,
    AbstractService,
    abstract_dynamo_endpoint,
    abstract_endpoint,
    api,
    bind,
    depends,
    dynamo_endpoint,
    endpoint,
    get_capi_library_path,
    liveness,
    readiness,
    service,
)
from dynamo.sdk.core.protocol.interface import ComponentType, LinkedServices
from dynamo.sdk.endpoint import probes
from dynamo.sdk.graph import build
from dynamo.sdk.lib.utils import str_to_bool
from dynamo.sdk.links import EDGES, Edge
from dynamo.sdk.spec import spec_of


class Foo(AbstractService):
    @abstract_endpoint
    def foo(self, x: int) -> int: ...

    @abstract_endpoint
    def bar(self, y: int) -> int: ...


class Baz(AbstractDynamoService):
    @abstract_dynamo_endpoint
    def baz(self, z: int) -> int: ...


@service
class Good(Foo, Baz):
    @endpoint
    async def foo(self, x: int) -> int:  # type: ignore[override]
        return x + 1

    @dynamo_endpoint()
    async def bar(self, y: int) -> int:  # type: ignore[override]
        return y + 1

    @api
    def baz(self, z: int) -> int:
        return z + 1


@pytest.fixture(autouse=True)
def _forget_links() -> Iterator[None]:
    before = len(EDGES)
    yield
    del EDGES[before:]


async def test_implementations_and_their_children() -> None:
    @service
    class ManagedProcess(Good):
        async def foo(self, x: int) -> int:  # type: ignore[override]
            return x + 2

    assert (await Good().foo(1), await ManagedProcess().foo(1), Good().baz(1)) == (2, 3, 2)  # type: ignore[misc]
    assert set(spec_of(ManagedProcess).endpoints) == {"foo", "bar"}


def test_each_mistake_has_its_message() -> None:
    class Mistaken(Foo, Baz):
        def foo(self, x: int) -> int:
            return x

        bar = 123  # type: ignore[assignment]

    with pytest.raises(TypeError) as caught:
        service(Mistaken)
    assert str(caught.value).startswith(
        "Mistaken violates Dynamo interface — missing implementation(s): baz; method(s) not decorated with @endpoint: foo; "
        "bar must be callable, got int\nhint: "
    )


def test_interfaces_are_not_instantiated() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Foo()  # type: ignore[abstract]


def test_an_interface_waits_for_a_link() -> None:
    @service
    class User:
        foo = depends(Foo)

    with pytest.raises(GraphError, match=r"Service Foo is not servable. Please use link(.|\n)*hint: add User.link\(<a"):
        build("g", User, [])
    with pytest.raises(GraphError, match=r"not linked(.|\n)*<a service that is a Foo>"):
        _ = User().foo
    assert User.link(Good) is Good  # type: ignore[attr-defined]
    graph = build("g", User, [Edge(User, "foo", Good, "g")])
    assert graph.targets["User"] == {"foo": Good}
    user = User()
    bind(user, foo=Good())
    assert user.foo.bar


# -- the service object


def test_class_attributes_of_the_era() -> None:
    @service(resources={"cpu": 3, "memory": 4}, dynamo={"namespace": "n", "component_type": ComponentType.PLANNER})
    class Backend:
        @endpoint(name="text/length")
        async def length(self, text: str) -> int:
            return len(text)

    @service
    class Backend2:
        pass

    @service
    class Middle:
        backend = depends(Backend)
        backend2 = depends(Backend2)

    @service
    class Frontend:
        backend = depends(Backend)
        middle = depends(Middle)

    F: type = Frontend
    B: type = Backend
    M: type = Middle
    assert (F.inner, F.name) == (Frontend, "Frontend")
    assert list(B.get_dynamo_endpoints()) == ["text/length"]
    assert set(F.dependencies) == {"backend", "middle"}
    assert set(M.dependencies) == {"backend", "backend2"}
    F.link(M).link(B)
    LinkedServices.remove_unused_edges()
    assert [set(s.dependencies) for s in (F, M, B)] == [{"middle"}, {"backend"}, set()]
    assert list(F.all_services()) == ["Backend", "Middle", "Frontend"]


def test_instances_keep_these_names_for_themselves() -> None:
    @service
    class Own:
        config: dict[str, int]

        def __init__(self) -> None:
            self.name = "mine"

        @endpoint
        async def dependencies(self, n: int) -> int:
            return n

    own = Own()
    assert own.name == "mine"
    assert not hasattr(own, "inner")
    assert not hasattr(own, "config")
    assert not hasattr(Own, "config")
    assert callable(own.dependencies)


def test_probe_routes() -> None:
    @service
    class Probed:
        @liveness
        def alive(self) -> bool:
            return True

        @readiness(route="custom/ready")
        @liveness(route="/custom/live")
        def both(self) -> bool:
            return True

    assert probes(Probed, "liveness") == {"alive": "/healthz", "both": "/custom/live"}
    assert probes(Probed, "readiness") == {"both": "/custom/ready"}


def test_small_ones() -> None:
    assert [str_to_bool(text) for text in ("true", "TRUE", "1", "no", "False")] == [True, True, True, False, False]
    for call in (lambda: str_to_bool("maybe"), get_capi_library_path):
        with pytest.raises(Exception, match="hint: "):
            call()

"""Links and graphs: which services a graph has, and what is wrong with a bad one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import pytest

from dynamo.errors import EndpointMissingError, GraphError
from dynamo.sdk import Service, depends, service
from dynamo.sdk.graph import build, load
from dynamo.sdk.links import EDGES, Edge

numbers = itertools.count()


@service
class Worker(Service):
    pass


@service
class Special(Worker):
    pass


@service
class Processor(Service):
    worker = depends(Worker)


@service
class Frontend(Service):
    worker = depends(Worker)
    special = depends(Special)
    processor = depends(Processor)


def edges(*links: tuple[type[Any], str, type[Any]]) -> list[Edge]:
    return [Edge(source, attribute, target, "g") for source, attribute, target in links]


@pytest.fixture(autouse=True)
def _forget_links() -> Iterator[None]:
    before = len(EDGES)
    yield
    del EDGES[before:]


def test_link_returns_its_target_and_belongs_to_its_module() -> None:
    assert Processor.link(Special) is Special
    assert EDGES[-1] == Edge(Processor, "worker", Special, __name__)


def test_link_prefers_the_exact_class() -> None:
    Frontend.link(Special)
    assert EDGES[-1].attribute == "special"
    Frontend.link(Worker)
    assert EDGES[-1].attribute == "worker"


def test_link_errors_name_the_attributes() -> None:
    with pytest.raises(
        GraphError, match=r"Frontend does not fulfill any dependencies(.|\n)*worker = depends\(Worker\)"
    ):
        Processor.link(Frontend)
    with pytest.raises(GraphError, match="dependencies of Worker: none"):
        Worker.link(Processor)
    with pytest.raises(GraphError, match="int is not a service"):
        Processor.link(int)

    @service
    class Two(Service):
        a = depends(Worker)
        b = depends(Worker)

    with pytest.raises(GraphError, match="multiple dependencies required by Two: a, b"):
        Two.link(Worker)


@pytest.mark.parametrize("checked", [False, True])
def test_services_that_derive_from_a_protocol_are_linked(checked: bool) -> None:
    class Mixin(Protocol):
        def helper(self) -> int: ...

    base = runtime_checkable(Mixin) if checked else Mixin

    @service
    class Lower(base):  # type: ignore[valid-type, misc]
        def __init__(self) -> None: ...

    @service
    class Lowest(Lower):
        def __init__(self) -> None: ...

    @service
    class Upper(base):  # type: ignore[valid-type, misc]
        lower = depends(Lower)

        def __init__(self) -> None: ...

    upper = cast(Any, Upper)
    assert upper.link(Lowest) is Lowest
    assert build("g", Upper, [edge for edge in EDGES if edge.source is Upper]).targets["Upper"] == {"lower": Lowest}
    assert type(Upper()) is Upper
    with pytest.raises(GraphError, match="Worker does not fulfill any dependencies required by Upper"):
        upper.link(Worker)


def test_without_links_everything_is_deployed() -> None:
    graph = build("g", Frontend, [])
    assert list(graph.services) == ["Worker", "Special", "Processor", "Frontend"]
    assert graph.targets["Frontend"] == {"worker": Worker, "special": Special, "processor": Processor}
    assert graph.service("Worker") is Worker
    with pytest.raises(GraphError, match=r"g has no service 'X'\nhint: services of this graph: Worker, "):
        graph.service("X")


def test_with_links_only_what_is_linked() -> None:
    graph = build("g", Frontend, edges((Frontend, "processor", Processor), (Processor, "worker", Special)))
    assert list(graph.services) == ["Special", "Processor", "Frontend"]
    assert graph.targets["Processor"] == {"worker": Special}
    assert "worker" not in graph.targets["Frontend"]


def test_a_dependency_without_a_link_reaches_the_service_that_another_link_starts() -> None:
    @service
    class Leaf(Service):
        pass

    @service
    class Router(Service):
        leaf = depends(Leaf)

    @service
    class Middle(Service):
        leaf = depends(Leaf)
        spare = depends(Leaf, optional=True)
        router = depends(Router)

    @service
    class Entry(Service):
        middle = depends(Middle)

    chain = edges((Entry, "middle", Middle), (Middle, "router", Router), (Router, "leaf", Leaf))
    graph = build("g", Entry, chain)
    assert list(graph.services) == ["Leaf", "Router", "Middle", "Entry"]
    assert graph.targets["Middle"] == {"router": Router, "leaf": Leaf}
    assert build("g", Entry, chain[:2]).targets["Middle"] == {"router": Router}


def test_a_dependency_without_a_link_closes_no_cycle_and_starts_before_its_caller() -> None:
    @service
    class Early(Service):
        pass

    @service
    class Late(Service):
        early = depends(Early)

    Early.late = depends(Late)  # type: ignore[attr-defined]
    Early.late.__set_name__(Early, "late")  # type: ignore[attr-defined]

    @service
    class Top(Service):
        early = depends(Early)
        late = depends(Late)

    both = edges((Top, "early", Early), (Top, "late", Late))
    graph = build("g", Top, both)
    assert list(graph.services) == ["Late", "Early", "Top"]
    assert graph.targets == {"Late": {}, "Early": {"late": Late}, "Top": {"early": Early, "late": Late}}
    assert build("g", Top, [*both, *edges((Late, "early", Early))]).targets["Early"] == {}


def test_cycle() -> None:
    @service
    class A(Service):
        pass

    @service
    class B(Service):
        a = depends(A)

    A.b = depends(B)  # type: ignore[attr-defined]
    A.b.__set_name__(A, "b")  # type: ignore[attr-defined]
    with pytest.raises(GraphError, match="in a cycle: A -> B -> A"):
        build("g", A, [])


def test_two_services_of_one_name() -> None:
    @service
    class Other(Service):
        one = depends(Worker)
        two = depends(service(type("Worker", (Service,), {"__module__": "elsewhere"})))

    with pytest.raises(GraphError, match=f"two services are named Worker: {__name__} and elsewhere"):
        build("g", Other, [])


def test_one_dependency_linked_twice() -> None:
    twice = edges((Processor, "worker", Worker), (Processor, "worker", Worker))
    assert build("g", Processor, twice).targets["Processor"] == {"worker": Worker}
    with pytest.raises(GraphError, match="worker is linked to Worker and to Special"):
        build("g", Processor, edges((Processor, "worker", Worker), (Processor, "worker", Special)))


# -- loading

SERVICES = "from dynamo.sdk import Service, depends, service\n"
AB = SERVICES + "@service\nclass B(Service): pass\n@service\nclass A(Service):\n    b = depends(B)\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(text: str, name: str = "") -> str:
        name = name or f"graph_module_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_load(write: Any, tmp_path: Path) -> None:
    name = write(AB + "A.link(B)\n")
    for spec in (f"{name}:A", name, f"{name}.py:A", f"{name}.py", str(tmp_path / f"{name}.py")):
        graph = load(spec, tmp_path)
        assert (graph.entry.__name__, list(graph.services)) == ("A", ["B", "A"])
    assert list(load(f"{name}:B", tmp_path).services) == ["B"]


def test_links_of_another_graph_do_not_count(write: Any, tmp_path: Path) -> None:
    parts = write(
        SERVICES
        + "@service\nclass C(Service): pass\n"
        + AB.replace(SERVICES, "")
        + "A.c = depends(C)\nA.c.__set_name__(A, 'c')\n"
    )
    one = write(f"from {parts} import *\nA.link(B)\n")
    two = write(f"from {parts} import *\nA.link(C)\n")
    assert set(load(f"{one}:A", tmp_path).services) == {"A", "B"}
    assert set(load(f"{two}:A", tmp_path).services) == {"A", "C"}


def test_file_named_like_a_module_of_the_library(write: Any, tmp_path: Path) -> None:
    import types

    name = write(AB, "types")
    assert load(f"{name}.py:A", tmp_path).entry.__module__ == "graph_types"
    assert sys.modules["types"] is types


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("", "no_such_module_x:A", r"graph module 'no_such_module_x' not found\nhint: run from"),
        ("", "no_such_package_x.graph:A", "graph module 'no_such_package_x.graph' not found"),
        ("", "absent.py:A", r"graph file absent.py does not exist"),
        ("", "", "is not a module name"),
        ("", ":A", "is not a module name"),
        ("", "a/b:A", "is not a module name"),
        ("", "..a:A", "is not a module name"),
        ("import no_such_thing_x.y\n", "{}:A", r"'no_such_thing_x', which is not installed\nhint: pip install no_such"),
        ("import dynamo.sdk.nothing\n", "{}:A", r"'dynamo.sdk.nothing', which does not exist\nhint: look for it in dynamo"),
        (AB, "{}:Z", r":Z: not found\nhint: services there: A, B"),
        (AB + "n = 1\n", "{}:n", ":n: a int, not a service"),
        ("n = 1\n", "{}:A", "services there: none"),
        ("n = 1\n", "{}", r"has no services\nhint: decorate a class"),
        (AB + "@service\nclass C(Service): pass\n", "{}", r"several root services: A, C\nhint: name one: .*:A"),
    ],
)  # fmt: skip
def test_loading_errors(write: Any, tmp_path: Path, text: str, spec: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        load(spec.format(write(text)), tmp_path)


def test_another_name_for_the_root_is_no_second_root(write: Any, tmp_path: Path) -> None:
    assert load(write(AB + "Entry = A\n"), tmp_path).entry.__name__ == "A"


@pytest.mark.parametrize("suffix", ["", ".py"])
def test_errors_of_the_module_itself_pass_through(write: Any, tmp_path: Path, suffix: str) -> None:
    name = write("raise KeyError('own')\n")
    for _ in range(2):  # a module that failed is not taken for loaded
        with pytest.raises(KeyError, match="own"):
            load(f"{name}{suffix}:A", tmp_path)
    with pytest.raises(ImportError, match="cannot import name"):
        load(write("from dynamo.sdk import nothing\n"), tmp_path)


CALLS = """
from dynamo.sdk import depends, endpoint, service

@service
class Worker:
    @endpoint
    async def generate(self) -> str:
        return self.helper()

    def helper(self) -> str:
        return "done"

@service
class Entry:
    worker = depends(Worker)

    @endpoint
    async def run(self) -> str:
        def call():
            return {call}
        return await call()
"""


def test_a_call_to_a_plain_method_is_refused_with_its_place(write: Any, tmp_path: Path) -> None:
    module = write(CALLS.format(call="self.worker.helper()"))
    with pytest.raises(
        EndpointMissingError, match=r"\.py:20: Worker has no endpoint 'helper'; endpoints: generate"
    ) as caught:
        load(f"{module}:Entry", tmp_path)
    assert caught.value.hint == "mark Worker.helper with @endpoint, or keep the call inside Worker"


@pytest.mark.parametrize("call", ["self.worker.generate()", "self.worker.of_a_subclass()", "self.helper.helper()"])
def test_calls_that_may_be_endpoints_are_accepted(write: Any, tmp_path: Path, call: str) -> None:
    assert load(f"{write(CALLS.format(call=call))}:Entry", tmp_path).entry.__name__ == "Entry"


PLAIN_OBJECTS = {
    "assigned in the constructor": """
    def __init__(self, local: bool = True) -> None:
        if local:
            self.worker = Worker()

    def run(self) -> str:
        return self.worker.helper()
""",
    "guarded by hasattr": """
    def run(self) -> str:
        return self.worker.helper() if hasattr(self.worker, "helper") else ""
""",
    "guarded by except": """
    def run(self) -> str:
        try:
            return self.worker.helper()
        except AttributeError:
            return ""
""",
}


@pytest.mark.parametrize("body", PLAIN_OBJECTS.values(), ids=PLAIN_OBJECTS)
def test_calls_that_may_reach_a_plain_object_are_accepted(write: Any, tmp_path: Path, body: str) -> None:
    entry = CALLS[: CALLS.rindex("    @endpoint")] + body
    assert load(f"{write(entry)}:Entry", tmp_path).entry.__name__ == "Entry"


def test_a_call_below_text_that_is_not_indented_is_refused(write: Any, tmp_path: Path) -> None:
    text = CALLS.replace("def call():", 'prompt = """\nat the margin\n"""\n        def call():')
    with pytest.raises(EndpointMissingError, match=r"\.py:23: Worker has no endpoint 'helper'"):
        load(f"{write(text.format(call='self.worker.helper()'))}:Entry", tmp_path)


def test_a_file_with_a_missing_import_gets_the_same_hint(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_thing_x\n")
    message = r"graph file 'broken\.py' cannot be imported: it needs module 'no_such_thing_x', which is not installed"
    with pytest.raises(GraphError, match=message) as caught:
        load("broken.py", tmp_path)
    assert caught.value.hint == "pip install no_such_thing_x"

"""Dependencies: what stands behind `self.worker` in a process and in a test."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo.errors import GraphError, NotLinkedError
from dynamo.sdk import (
    avoiding,
    bind,
    depends,
    direct,
    endpoint,
    in_flight,
    instance_ids,
    least_loaded,
    power_of_two,
    random,
    round_robin,
    service,
)
from dynamo.sdk.depends import Choice, Dependency, StartCall, Stub, dependencies
from dynamo.sdk.endpoint import EndpointSpec
from dynamo.sdk.in_memory_broker import InMemoryBroker
from dynamo.sdk.spec import spec_of
from dynamo.streams import Channel, Stream


@service
class Worker:
    @endpoint
    async def generate(self, request: int) -> AsyncIterator[int]:
        yield request

    @endpoint
    async def ping(self) -> str:
        return "pong"

    @endpoint
    async def caller(self, request: int) -> int:
        return request

    def inner(self) -> int:
        return 1


@service
class Processor:
    worker = depends(Worker)

    async def run(self, n: int) -> list[int]:
        return [i async for i in self.worker.generate(n)]


@service
class Narrow(Processor):
    other = depends(Worker)


class Recorder:
    broker = InMemoryBroker()

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Choice]] = []
        self.avoided: list[frozenset[int]] = []

    def endpoint(self, spec: EndpointSpec) -> StartCall:
        def start(request: Any, choice: Choice, avoid: frozenset[int]) -> Stream[Any]:
            self.calls.append((spec.name, request, choice))
            self.avoided.append(avoid)
            return Stream(Channel())

        return start

    def instance_ids(self) -> list[int]:
        return [7]

    def in_flight(self) -> dict[int, int]:
        return {7: 2}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def remote(recorder: Recorder) -> Any:
    return Stub(spec_of(Worker), recorder)


def test_calls_go_to_the_pool(remote: Any, recorder: Recorder) -> None:
    remote.generate(1)
    remote.generate(request=2)
    remote.ping()
    remote.caller(3)
    assert [(name, request) for name, request, _ in recorder.calls] == [
        ("generate", 1), ("generate", 2), ("ping", None), ("caller", 3)
    ]  # fmt: skip


def test_choices(remote: Any, recorder: Recorder) -> None:
    chosen = (remote, random(remote), direct(remote, 5), round_robin(random(remote)))
    for client in (*chosen, power_of_two(remote), least_loaded(remote)):
        client.generate(1)
    assert [choice for _, _, choice in recorder.calls] == [
        "round_robin", "random", 5, "round_robin", "power_of_two", "least_loaded"
    ]  # fmt: skip
    assert instance_ids(remote) == [7]
    assert in_flight(remote) == {7: 2}
    assert repr(direct(remote, 5)) == "<stub of Worker, 5>"


def test_instances_to_avoid(remote: Any, recorder: Recorder) -> None:
    for client in (least_loaded(avoiding(remote, [1, 2])), avoiding(random(remote), [3]), avoiding(remote, [])):
        client.generate(1)
    for pinned in (avoiding(direct(remote, 5), [5]), direct(avoiding(remote, [5]), 5)):
        pinned.generate(1)
    assert recorder.avoided == [{1, 2}, {3}, set(), set(), set()]
    assert [choice for _, _, choice in recorder.calls] == ["least_loaded", "random", "round_robin", 5, 5]


@pytest.mark.parametrize("call", [lambda r: r.generate(1, 2), lambda r: r.generate(wrong=1), lambda r: r.ping(1)])
def test_wrong_arguments(remote: Any, call: Any) -> None:
    with pytest.raises(TypeError, match=r"endpoint Worker.* takes"):
        call(remote)


def test_what_is_no_endpoint(remote: Any) -> None:
    with pytest.raises(
        AttributeError, match="Worker has no endpoint 'inner'; endpoints: generate, ping, caller\nhint: mark"
    ):
        remote.inner()
    assert not hasattr(remote, "inner")


async def test_bind_a_fake() -> None:
    processor = Processor()
    bind(processor, worker=Worker())
    assert await processor.run(4) == [4]
    assert processor.worker.inner() == 1
    for choose in (random, round_robin, power_of_two, least_loaded, lambda client: direct(client, 3)):
        assert choose(processor.worker) is processor.worker
    assert instance_ids(processor.worker) == []
    assert in_flight(processor.worker) == {}


def test_unlinked_dependency_says_what_to_do() -> None:
    with pytest.raises(
        GraphError, match=r"Processor.worker is not linked(.|\n)*Processor.link\(Worker\)(.|\n)*bind\(obj, worker="
    ):
        _ = Processor().worker
    assert not hasattr(Processor, "nothing")


def test_bind_refuses_what_is_no_dependency() -> None:
    with pytest.raises(GraphError, match="Processor has no dependency 'wroker'; it has worker"):
        bind(Processor(), wroker=Worker())


def test_dependencies_are_inherited_and_can_be_replaced() -> None:
    assert list(dependencies(Narrow)) == ["worker", "other"]
    assert isinstance(Narrow.worker, Dependency)
    assert repr(Narrow.worker) == "depends(Worker)"

    class Without(Narrow):
        worker = None  # type: ignore[assignment]

    assert list(dependencies(Without)) == ["other"]


def test_instances_do_not_share_targets() -> None:
    one, two = Processor(), Processor()
    bind(one, worker=Worker())
    with pytest.raises(GraphError):
        _ = two.worker


def test_depends_on_services_only() -> None:
    for wrong in (int, None, Worker()):
        with pytest.raises(GraphError, match="is not a service"):
            depends(wrong)  # type: ignore[type-var, arg-type]


# -- introspection of a dependency: as of any Python object


def stub() -> Any:
    return Stub(spec_of(Worker), Recorder())


def test_a_stub_has_no_attributes_of_its_own() -> None:
    assert stub().__dict__ == vars(stub()) == vars(stub().generate) == {}
    assert "Worker" in repr(stub())


@pytest.mark.parametrize(
    "name", ["__wrapped__", "__len__", "__await__", "__aiter__", "__fspath__", "__array__", "__setstate__"]
)
def test_pythons_own_probes_find_nothing(name: str) -> None:
    assert not hasattr(stub(), name)
    with pytest.raises(AttributeError, match=f"'Stub' object has no attribute '{name}'") as caught:
        getattr(stub(), name)
    assert not isinstance(caught.value, GraphError)


def test_a_copy_is_the_stub_itself() -> None:
    processor = Processor()
    bind(processor, worker=stub())
    for copied in (copy.copy(processor), copy.deepcopy(processor)):
        assert copied is not processor
        assert copied.worker is processor.worker
    call = stub().generate
    assert copy.deepcopy(call) is copy.copy(call) is call


def test_a_stub_cannot_be_pickled() -> None:
    for thing in (stub(), stub().generate):
        with pytest.raises(TypeError, match=r"cannot pickle <(stub of Worker|endpoint Worker\.generate)"):
            pickle.dumps(thing)


def test_inspect_reads_stubs_and_their_owners() -> None:
    assert inspect.unwrap(stub()) is not None
    assert not inspect.isawaitable(stub())
    assert not inspect.iscoroutinefunction(stub())
    assert "generate" not in dict(inspect.getmembers(stub()))
    processor = Processor()
    assert "worker" not in dict(inspect.getmembers(processor))  # not linked
    assert not hasattr(processor, "worker")
    with pytest.raises(NotLinkedError, match="is not linked in this graph"):
        _ = processor.worker
    target = stub()
    bind(processor, worker=target)
    assert dict(inspect.getmembers(processor))["worker"] is target

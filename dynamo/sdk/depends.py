"""`depends()`: a typed edge to another service, and what stands behind the attribute in a running process or a test."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, cast, overload

from dynamo.errors import GraphError
from dynamo.sdk.broker import Broker
from dynamo.sdk.endpoint import EndpointSpec
from dynamo.sdk.spec import ServiceSpec, is_interface, spec_of
from dynamo.streams import Stream

T = TypeVar("T")


class Avoiding(NamedTuple):
    """Choose so, but none of these instances while there are others."""

    choice: Literal["round_robin", "random", "power_of_two", "least_loaded"]
    instances: frozenset[int]


Choice = Literal["round_robin", "random", "power_of_two", "least_loaded"] | int | Avoiding
"""How a call picks an instance; an int is an instance id."""


class Caller(Protocol):
    """How a stub reaches a service. The runtime implements it; `serve` joins the two."""

    @property
    def channels(self) -> Broker: ...
    def call(self, endpoint: EndpointSpec, request: Any, choice: Choice) -> Stream[Any]: ...
    def instance_ids(self) -> list[int]: ...
    def in_flight(self) -> dict[int, int]: ...


class Stub:
    """Stands behind a dependency in a running process: its endpoints are called over the wire, its channels are those
    of all instances, and nothing else exists."""

    __slots__ = ("_caller", "_choice", "_spec")  # an endpoint may have any name that a method may have

    def __init__(self, spec: ServiceSpec, caller: Caller, choice: Choice = "round_robin") -> None:
        self._spec, self._caller = spec, caller
        self._choice: Choice = choice

    def __getattr__(self, name: str) -> Any:
        endpoint = self._spec.endpoints.get(name)
        if endpoint is None:
            channel = self._spec.channels.get(name)
            if channel is not None:
                return channel.open(self._caller.channels)
            service = self._spec.name
            raise AttributeError(
                f"{service} has no endpoint {name!r}; endpoints: {', '.join(self._spec.endpoints) or 'none'}\n"
                f"hint: mark {service}.{name} with @endpoint, or keep the call inside {service}"
            )
        return partial(_call, self._caller, endpoint, self._choice)

    def __repr__(self) -> str:
        return f"<remote {self._spec.name}, {self._choice}>"


def _call(caller: Caller, endpoint: EndpointSpec, choice: Choice, /, *args: Any, **named: Any) -> Stream[Any]:
    parameter = endpoint.parameter
    if len(args) + len(named) > 1 or (parameter is None and args) or named.keys() - {parameter}:
        takes = f"one request, {parameter}" if parameter else "no request"
        raise TypeError(f"endpoint {endpoint.function.__qualname__} takes {takes}")
    return caller.call(endpoint, named[parameter] if parameter and named else args[0] if args else None, choice)


class Dependency(Generic[T]):
    """The descriptor that `depends()` returns. On an instance it is typed as the service itself."""

    def __init__(self, on: type[T], *, optional: bool = False) -> None:
        self.on, self.optional = on, optional
        self.attribute = self.slot = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute, self.slot = name, f"_dynamo_dependency_{name}"

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Dependency[T]: ...
    @overload
    def __get__(self, instance: object, owner: Any = None) -> T: ...
    def __get__(self, instance: object | None, owner: Any = None) -> Dependency[T] | T:
        if instance is None:
            return self
        try:
            return cast(T, instance.__dict__[self.slot])
        except KeyError:
            name = f"{type(instance).__name__}.{self.attribute}"
            target = f"<a service that is a {self.on.__name__}>" if is_interface(self.on) else self.on.__name__
            raise GraphError(
                f"{name} is not linked in this graph",
                hint=f"add {type(instance).__name__}.link({target}) to the graph module, "
                f"or call bind(obj, {self.attribute}=...) in a test",
            ) from None

    def __repr__(self) -> str:
        return f"depends({self.on.__name__})"


def depends(on: Callable[..., T], /, *, optional: bool = False) -> Dependency[T]:
    """Declare that this service calls `on`, a service or an interface. `self.<attribute>` is then typed as `on` itself.

    An `optional` one is there only where a graph links it (ask `is_linked`), and this service starts without waiting
    for an instance of it. Behind an interface (a subclass of `AbstractService`) stands what `.link()` puts there.
    """
    cls = cast("type[T]", on)  # not its type above: there, mypy would refuse a class with abstract methods
    if not is_interface(cls):
        spec_of(cls)
    return Dependency(cls, optional=optional)


def dependencies(cls: type[Any]) -> dict[str, Dependency[Any]]:
    """attribute -> dependency of a service class, inherited ones included."""
    found: dict[str, Dependency[Any]] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Dependency):
                found[name] = value
            else:
                found.pop(name, None)  # a subclass put something else in its place
    return found


def bind(instance: object, **targets: object) -> None:
    """Put something behind dependencies of one live object: plain objects in a test, remote stubs in a process.

    `bind(processor, worker=FakeWorker())`. Raises GraphError for an attribute that is no dependency.
    """
    known = dependencies(type(instance))
    for attribute, target in targets.items():
        if attribute not in known:
            raise GraphError(
                f"{type(instance).__name__} has no dependency {attribute!r}; it has {', '.join(known) or 'none'}"
            )
        instance.__dict__[known[attribute].slot] = target


def is_linked(instance: object, attribute: str) -> bool:
    """Whether something stands behind a dependency of an object: a graph may leave it out."""
    return dependencies(type(instance))[attribute].slot in instance.__dict__


def _choose(client: T, choice: Choice) -> T:
    return cast(T, Stub(client._spec, client._caller, choice)) if isinstance(client, Stub) else client


def direct(client: T, instance_id: int) -> T:
    """The same client, pinned to one instance: `direct(self.worker, worker_id).generate(request)`."""
    return _choose(client, instance_id)


def random(client: T) -> T:
    """The same client, each call to a random instance."""
    return _choose(client, "random")


def round_robin(client: T) -> T:
    """The same client, each call to the next instance in turn; what a client does if nothing else is said."""
    return _choose(client, "round_robin")


def power_of_two(client: T) -> T:
    """The same client, each call to the one of two random instances where fewer calls of this process run."""
    return _choose(client, "power_of_two")


def least_loaded(client: T) -> T:
    """The same client, each call to the instance where fewest calls of this process run; to equal ones in turn."""
    return _choose(client, "least_loaded")


def avoiding(client: T, instances: Collection[int]) -> T:
    """The same client, whose calls go to none of these instances while there are others; not for a pinned client."""
    if not instances or not isinstance(client, Stub) or isinstance(client._choice, int):
        return client
    choice = client._choice.choice if isinstance(client._choice, Avoiding) else client._choice
    return _choose(client, Avoiding(choice, frozenset(instances)))


def instance_ids(client: object) -> list[int]:
    """Ids of the live instances behind a dependency; empty for a plain object in a test."""
    return client._caller.instance_ids() if isinstance(client, Stub) else []


def in_flight(client: object) -> dict[int, int]:
    """How many calls of this process run at each live instance behind a dependency; empty for a plain object."""
    return client._caller.in_flight() if isinstance(client, Stub) else {}

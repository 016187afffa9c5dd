"""`depends()`: a typed edge to another service, and the stub behind it in a served process."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Generic, Literal, NoReturn, Protocol, Self, TypeVar, cast, overload

from dynamo.errors import EndpointMissingError, GraphError, NotLinkedError
from dynamo.sdk.arguments import warn_ignored
from dynamo.sdk.broker import Broker
from dynamo.sdk.endpoint import EndpointSpec
from dynamo.sdk.spec import ServiceSpec, is_interface, spec_of
from dynamo.streams import Stream

T = TypeVar("T")


Policy = Literal["round_robin", "random", "power_of_two", "least_loaded"]
"""How a call picks one of the instances."""
Choice = Policy | int
"""A policy, or the id of an instance."""


class StartCall(Protocol):
    """Start a call of one endpoint: send `request` to an instance by `choice`, to none of `avoid` while others exist."""

    def __call__(self, request: Any, choice: Choice, avoid: frozenset[int]) -> Stream[Any]: ...


class Pool(Protocol):
    """The instances of one service, as a stub reaches them: over the wire in a served process, in memory in a test."""

    @property
    def broker(self) -> Broker: ...
    def endpoint(self, spec: EndpointSpec) -> StartCall: ...
    def instance_ids(self) -> list[int]: ...
    def in_flight(self) -> dict[int, int]: ...


def no_endpoint(spec: ServiceSpec, name: str) -> EndpointMissingError:
    """Return the error for using `name` of a service as if it were an endpoint."""
    return EndpointMissingError(
        f"{spec.name} has no endpoint {name!r}; endpoints: {', '.join(spec.endpoints) or 'none'}",
        hint=f"mark {spec.name}.{name} with @endpoint, or keep the call inside {spec.name}",
    )


class _Reference:
    """A handle on another process: a copy of it is itself, and it cannot be pickled."""

    __slots__ = ()

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # for `vars()`; there are slots instead
        return {}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"cannot pickle {self!r}: it holds connections of this process")


class Stub(_Reference):
    """The object behind a dependency in a served process: the service's endpoints and channels, and nothing else."""

    __slots__ = ("_avoid", "_choice", "_pool", "_spec")  # an endpoint may have any name that a method may have

    def __init__(
        self, spec: ServiceSpec, pool: Pool, choice: Choice = "round_robin", avoid: frozenset[int] = frozenset()
    ) -> None:
        self._spec = spec
        self._pool = pool
        self._choice: Choice = choice
        self._avoid = avoid

    def __getattr__(self, name: str) -> Any:
        endpoint = self._spec.endpoints.get(name)
        if endpoint is not None:
            return RemoteMethod(endpoint, self._pool.endpoint(endpoint), self._choice, self._avoid)
        channel = self._spec.channels.get(name)
        if channel is not None:
            return channel.open(self._pool.broker)
        if name.startswith("__"):  # Python's own probes, as by `inspect`, are no calls
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise no_endpoint(self._spec, name)

    def __repr__(self) -> str:
        return f"<stub of {self._spec.name}, {self._choice}>"


class RemoteMethod(_Reference):
    """One endpoint of a stub. Calling it sends the request; await or iterate the result."""

    __slots__ = ("_avoid", "_choice", "_endpoint", "_start")

    def __init__(self, endpoint: EndpointSpec, start: StartCall, choice: Choice, avoid: frozenset[int]) -> None:
        self._endpoint = endpoint
        self._start = start
        self._choice: Choice = choice
        self._avoid = avoid

    def __call__(self, *args: Any, **named: Any) -> Stream[Any]:
        parameter = self._endpoint.parameter
        if len(args) + len(named) > 1 or (parameter is None and args) or named.keys() - {parameter}:
            takes = f"one request, {parameter}" if parameter else "no request"
            raise TypeError(f"endpoint {self._endpoint.function.__qualname__} takes {takes}")
        request = args[0] if args else named[parameter] if parameter and named else None
        return self._start(request, self._choice, self._avoid)

    def __repr__(self) -> str:
        return f"<endpoint {self._endpoint.function.__qualname__}>"


class Dependency(Generic[T]):
    """The descriptor that `depends()` returns; on an instance it is typed as the service itself."""

    def __init__(self, on: type[T], *, optional: bool = False) -> None:
        self.on = on
        self.optional = optional
        self.attribute = ""
        self.slot = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name
        self.slot = f"_dynamo_dependency_{name}"

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
            raise NotLinkedError(
                f"{name} is not linked in this graph",
                hint=f"add {type(instance).__name__}.link({target}) to the graph module, "
                f"or call bind(obj, {self.attribute}=...) in a test",
            ) from None

    def __repr__(self) -> str:
        return f"depends({self.on.__name__})"


def depends(on: Callable[..., T], *, optional: bool = False, **ignored: Any) -> Dependency[T]:
    """Declare that this service calls `on`, a service or an interface. `self.<attribute>` is then typed as `on` itself.

    An `optional` dependency exists only where a graph links it (check with `is_linked`), and this service starts
    without waiting for an instance of it. For an interface (a subclass of `AbstractService`), `.link()` decides which
    service stands behind it. Other arguments warn and have no effect. Raises GraphError for a class that is neither.
    """
    warn_ignored("depends()", ignored, ("on", "optional"))
    cls = cast("type[T]", on)  # not its type above: there, mypy would refuse a class with abstract methods
    if not is_interface(cls):
        spec_of(cls)
    return Dependency(cls, optional=optional)


def dependencies(cls: type[Any]) -> dict[str, Dependency[Any]]:
    """Return attribute -> dependency of a service class, inherited ones included."""
    found: dict[str, Dependency[Any]] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Dependency):
                found[name] = value
            else:
                found.pop(name, None)  # a subclass put something else in its place
    return found


def bind(instance: object, **targets: object) -> None:
    """Set the dependencies of one object: plain objects or doubles in a test, stubs in a served process.

    `bind(processor, worker=FakeWorker())`. Raises GraphError for an attribute that is not a dependency.
    """
    known = dependencies(type(instance))
    for attribute, target in targets.items():
        if attribute not in known:
            raise GraphError(
                f"{type(instance).__name__} has no dependency {attribute!r}; it has {', '.join(known) or 'none'}"
            )
        instance.__dict__[known[attribute].slot] = target


def is_linked(instance: object, attribute: str) -> bool:
    """Return whether a dependency of an object is set: a graph may leave it out."""
    return dependencies(type(instance))[attribute].slot in instance.__dict__


def _choosing(client: T, choice: Choice) -> T:
    if not isinstance(client, Stub):
        return client
    avoid = frozenset() if isinstance(choice, int) else client._avoid
    return cast(T, Stub(client._spec, client._pool, choice, avoid))


def direct(client: T, instance_id: int) -> T:
    """Return the client pinned to one instance: `direct(self.worker, worker_id).generate(request)`."""
    return _choosing(client, instance_id)


def random(client: T) -> T:
    """Return the client with each call going to a random instance."""
    return _choosing(client, "random")


def round_robin(client: T) -> T:
    """Return the client with each call going to the next instance in turn, which is the default."""
    return _choosing(client, "round_robin")


def power_of_two(client: T) -> T:
    """Return the client with each call going to the less busy of two random instances, by this process's calls."""
    return _choosing(client, "power_of_two")


def least_loaded(client: T) -> T:
    """Return the client with each call going to the instance with the fewest calls of this process; ties in turn."""
    return _choosing(client, "least_loaded")


def avoiding(client: T, instances: Collection[int]) -> T:
    """Return the client with calls going to none of `instances` while there are others; no effect on a pinned client."""
    if not instances or not isinstance(client, Stub) or isinstance(client._choice, int):
        return client
    return cast(T, Stub(client._spec, client._pool, client._choice, frozenset(instances)))


def instance_ids(client: object) -> list[int]:
    """Return the ids of the live instances behind a dependency; empty for a plain object in a test."""
    return client._pool.instance_ids() if isinstance(client, Stub) else []


def in_flight(client: object) -> dict[int, int]:
    """Return the number of this process's running calls by live instance id; empty for a plain object."""
    return client._pool.in_flight() if isinstance(client, Stub) else {}

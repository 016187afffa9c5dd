"""`@endpoint` and the life-cycle hooks: marks on methods, read by `@service`. The functions themselves stay as they are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_type_hints, overload

from dynamo.codec import item_type
from dynamo.errors import GraphError
from dynamo.sdk.api import mark_route
from dynamo.sdk.arguments import warn_ignored

F = TypeVar("F", bound=Callable[..., Any])

ENDPOINT_MARK = "__dynamo_endpoint__"
HOOKS_MARK = "__dynamo_hooks__"
PROBE_MARK = "__dynamo_probe__"
NAME = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)
"""Characters that are allowed in etcd keys and NATS subjects."""
LIVENESS_PATH, READINESS_PATH = "/healthz", "/readyz"

Hook = Literal["start", "shutdown", "liveness", "readiness"]


@dataclass(frozen=True)
class EndpointSpec:
    """A method that other services call: `name` is its address, `method` the attribute; `streaming` if it yields items."""

    name: str
    method: str
    streaming: bool
    function: Callable[..., Any]

    @cached_property
    def parameter(self) -> str | None:
        """Name of the request parameter; None if the method takes no request."""
        names = list(inspect.signature(self.function).parameters)
        return names[1] if len(names) > 1 else None

    def types(self) -> tuple[Any, Any]:
        """Return (request type, item or result type), Any where there is no usable annotation.

        Raises GraphError when an annotation cannot be resolved.
        """
        try:
            hints = get_type_hints(self.function)
        except NameError as error:
            raise GraphError(
                f"endpoint {self.function.__qualname__}: annotation cannot be resolved: {error}",
                hint="import the type at module level, outside `if TYPE_CHECKING:`",
            ) from None
        return hints.get(self.parameter or "", Any), item_type(hints.get("return", Any))


def describe(method: Callable[..., Any], address: str) -> EndpointSpec:
    return EndpointSpec(address, method.__name__, not inspect.iscoroutinefunction(method), method)


def endpoints(cls: type[Any]) -> dict[str, EndpointSpec]:
    """Return method name -> endpoint of a class, inherited ones included. An override remains one unless it is None.

    Raises GraphError when two methods share an address.
    """
    marked: dict[str, EndpointSpec] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            spec = getattr(value, ENDPOINT_MARK, None)
            if isinstance(spec, EndpointSpec):
                marked[name] = spec
    found: dict[str, EndpointSpec] = {}
    for name, spec in marked.items():
        function = getattr(cls, name)
        if callable(function):
            found[name] = spec if function is spec.function else replace(describe(function, spec.name), method=name)
    addresses = [spec.name for spec in found.values()]
    for name, spec in found.items():
        if addresses.count(spec.name) > 1:
            raise GraphError(f"{cls.__name__}.{name}: another endpoint already has the name {spec.name!r}")
    return found


@overload
def endpoint(function: F, /) -> F: ...
@overload
def endpoint(
    given: str | None = None,
    /,
    *,
    name: str | None = None,
    transports: Any = None,
    http_method: str | None = None,
    is_api: bool = False,
) -> Callable[[F], F]: ...
def endpoint(
    function: Any = None,
    /,
    *,
    name: str | None = None,
    transports: Any = None,
    http_method: str | None = None,
    is_api: bool = False,
    **ignored: Any,
) -> Any:
    """Make a method callable by other services; usable with or without parentheses.

    An `async def` that returns is a unary endpoint. An async generator, or a plain `def` that returns a `Stream` or
    another async iterator, is a streaming endpoint. `name` is the address, by default the method's name; it may contain
    slashes. `DynamoTransport.HTTP` in `transports`, or `is_api` (0.1), makes it an `@api` too; HTTP alone, only that.
    Other arguments warn and have no effect. Raises GraphError for an invalid name, a misspelled argument, or a method that
    takes several parameters.
    """
    if isinstance(function, str):  # @endpoint("name"), as in ai-dynamo 0.3
        function, name = None, function
    warn_ignored("@endpoint", ignored, ("name", "transports", "http_method", "is_api"))
    wanted = {str(getattr(transport, "name", transport)).upper() for transport in transports or ("DEFAULT",)}
    if is_api:
        wanted = {"HTTP"}
    if http_method is not None and "HTTP" not in wanted:
        raise GraphError(
            "http_method can only be specified for endpoints with HTTP transport",
            hint="write @api(http_method=...), or add transports=[DynamoTransport.HTTP]",
        )

    def mark(method: Any) -> Any:
        if not inspect.isfunction(method):
            raise GraphError(f"@endpoint goes on a method, not on a {type(method).__name__}")
        if "HTTP" in wanted:
            mark_route(method, name, http_method)
            if "DEFAULT" not in wanted:
                return method
        address = method.__name__ if name is None else name
        if not NAME.fullmatch(address):
            raise GraphError(
                f"endpoint name {address!r} of {method.__qualname__}: letters, digits, '_', '-' and '/' only",
                hint='give it a name such as "chat/completions"',
            )
        needed = [p for p in list(inspect.signature(method).parameters.values())[2:] if p.default is p.empty]
        if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in needed):
            raise GraphError(
                f"endpoint {method.__qualname__} takes several parameters: a call carries one request",
                hint="put them into one dataclass, Struct or pydantic model",
            )
        setattr(method, ENDPOINT_MARK, describe(method, address))
        return method

    return mark if function is None else mark(function)


def _hook(kind: Hook, function: Any) -> Any:
    def mark(method: Any) -> Any:
        setattr(method, HOOKS_MARK, (*getattr(method, HOOKS_MARK, ()), kind))
        return method

    return mark if function is None else mark(function)


@overload
def async_on_start(function: F, /) -> F: ...
@overload
def async_on_start() -> Callable[[F], F]: ...
def async_on_start(function: Any = None, /) -> Any:
    """Run this method (sync or async) after the constructor and before the service accepts requests."""
    return _hook("start", function)


@overload
def on_shutdown(function: F, /) -> F: ...
@overload
def on_shutdown() -> Callable[[F], F]: ...
def on_shutdown(function: Any = None, /) -> Any:
    """Run this method (sync or async) once when the service stops, after its last request."""
    return _hook("shutdown", function)


async_on_shutdown = on_shutdown


def _probe(kind: Hook, function: Any, route: str) -> Any:
    def mark(method: Any) -> Any:
        known: dict[str, str] = getattr(method, PROBE_MARK, {})
        setattr(method, PROBE_MARK, known | {kind: "/" + route.removeprefix("/")})
        return _hook(kind, method)

    return mark if function is None else mark(function)


@overload
def liveness(function: F, /) -> F: ...
@overload
def liveness(*, route: str = LIVENESS_PATH) -> Callable[[F], F]: ...
def liveness(function: Any = None, /, *, route: str = LIVENESS_PATH) -> Any:
    """Call this method (sync or async, returns a bool) every second to check that the service works.

    False or an exception removes the process from discovery and ends it; the supervisor starts another. `GET route` of
    the service's HTTP server and of its system app calls it too: 200, 503, or 500 with the exception's text.
    """
    return _probe("liveness", function, route)


@overload
def readiness(function: F, /) -> F: ...
@overload
def readiness(*, route: str = READINESS_PATH) -> Callable[[F], F]: ...
def readiness(function: Any = None, /, *, route: str = READINESS_PATH) -> Any:
    """Call this method (sync or async, returns a bool) until it returns True; the service is ready then.

    `GET route` calls it too, as with `liveness`.
    """
    return _probe("readiness", function, route)


def probes(cls: type[Any], kind: Hook) -> dict[str, str]:
    """Return method -> HTTP path of each `liveness` or `readiness` hook of a class."""
    found = {}
    for name in hooks(cls, kind):
        marks = (getattr(vars(base).get(name), PROBE_MARK, {}) for base in cls.__mro__)
        found[name] = next(mark[kind] for mark in marks if kind in mark)
    return found


def hooks(cls: type[Any], kind: Hook) -> list[str]:
    """Return the names of the methods marked with a hook, those of base classes first, then in order.

    A method that overrides a hook is a hook; None in its place removes it.
    """
    names: dict[str, None] = {}
    for base in reversed(cls.__mro__):
        for name, attribute in vars(base).items():
            if kind in getattr(attribute, HOOKS_MARK, ()):
                names.setdefault(name)
    return [name for name in names if callable(getattr(cls, name))]

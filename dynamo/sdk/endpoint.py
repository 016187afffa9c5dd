"""`@endpoint` and the life-cycle hooks: marks on methods, read by `@service`. The functions themselves stay as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_type_hints, overload

from dynamo.errors import GraphError
from dynamo.wire.codec import item_type

F = TypeVar("F", bound=Callable[..., Any])

ENDPOINT_MARK = "__dynamo_endpoint__"
HOOKS_MARK = "__dynamo_hooks__"

Hook = Literal["start", "shutdown", "liveness", "readiness"]


@dataclass(frozen=True)
class EndpointSpec:
    """One callable of a service: `name` is its address, `method` the attribute; `streaming` says that it gives items."""

    name: str
    method: str
    streaming: bool
    function: Callable[..., Any]

    def types(self) -> tuple[Any, Any]:
        """(request type, type of an item or of the result); Any where nothing usable is annotated."""
        parameters = list(inspect.signature(self.function).parameters)
        try:
            hints = get_type_hints(self.function)
        except NameError as error:
            raise GraphError(
                f"endpoint {self.function.__qualname__}: annotation cannot be resolved: {error}",
                hint="import the type at module level, outside `if TYPE_CHECKING:`",
            ) from None
        request = hints.get(parameters[1], Any) if len(parameters) > 1 else Any
        return request, item_type(hints.get("return", Any))


@overload
def endpoint(function: F, /) -> F: ...
@overload
def endpoint(*, name: str | None = None, transports: Any = None) -> Callable[[F], F]: ...
def endpoint(function: Any = None, /, *, name: str | None = None, **_: Any) -> Any:
    """Make a method callable by other services, with or without parentheses.

    An `async def` that returns is a unary endpoint. One that yields, or a plain `def` that returns a `Stream` or another
    async iterator, is a streaming one. `name` is the address, by default the method's name; it may contain slashes.
    """

    def mark(method: F) -> F:
        if not callable(method):
            raise GraphError(f"@endpoint goes on a method, not on {type(method).__name__}")
        if not (name or method.__name__).replace("/", "").replace("_", "").replace("-", "").isalnum():
            raise GraphError(
                f"endpoint name {name!r} of {method.__qualname__}: letters, digits, '_', '-' and '/' only",
                hint='give it a name such as "chat/completions"',
            )
        streaming = not inspect.iscoroutinefunction(method)
        setattr(method, ENDPOINT_MARK, EndpointSpec(name or method.__name__, method.__name__, streaming, method))
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
    """Run this method (sync or async) after the constructor and before the service takes requests."""
    return _hook("start", function)


@overload
def on_shutdown(function: F, /) -> F: ...
@overload
def on_shutdown() -> Callable[[F], F]: ...
def on_shutdown(function: Any = None, /) -> Any:
    """Run this method (sync or async) once when the service stops, after its last request."""
    return _hook("shutdown", function)


async_on_shutdown = on_shutdown


@overload
def liveness(function: F, /) -> F: ...
@overload
def liveness() -> Callable[[F], F]: ...
def liveness(function: Any = None, /) -> Any:
    """Ask this method (sync or async, gives a bool) every second whether the service works.

    False or an exception takes the process out of discovery and ends it; the supervisor starts another.
    """
    return _hook("liveness", function)


@overload
def readiness(function: F, /) -> F: ...
@overload
def readiness() -> Callable[[F], F]: ...
def readiness(function: Any = None, /) -> Any:
    """Ask this method (sync or async, gives a bool) whether the service can take requests; "ready" waits for True."""
    return _hook("readiness", function)


def hooks(cls: type[Any], kind: Hook) -> list[str]:
    """Names of the methods marked with that hook, inherited ones included, base classes first, then in order."""
    names: dict[str, None] = {}
    for base in reversed(cls.__mro__):
        for name, attribute in vars(base).items():
            if kind in getattr(attribute, HOOKS_MARK, ()):
                names.setdefault(name)
    return [n for n in names if kind in getattr(getattr(cls, n, None), HOOKS_MARK, ())]

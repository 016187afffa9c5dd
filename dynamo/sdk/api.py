"""`@api`: methods that answer HTTP requests. Marks only: `dynamo.http.api_app` mounts them in the service's process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar, overload

from dynamo.errors import GraphError

F = TypeVar("F", bound=Callable[..., Any])

ROUTE_MARK = "__dynamo_route__"
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class DynamoTransport(Enum):
    """What `@endpoint(transports=[...])` takes: DEFAULT is other services of the graph, HTTP is what `@api` is."""

    DEFAULT = "default"
    HTTP = "http"


@dataclass(frozen=True)
class Route:
    """`verb` `path` of the service's HTTP server is answered by the attribute `method`."""

    path: str
    verb: str
    method: str


def mark_route(function: Any, name: str | None, http_method: str | None) -> None:
    """Raises GraphError for what is no method, and for a path or an HTTP method that cannot be."""
    if not inspect.isfunction(function):
        raise GraphError(f"@api goes on a method, not on a {type(function).__name__}")
    path = "/" + (function.__name__ if name is None else name).removeprefix("/")
    if not path.isprintable() or set(path) & set(" ?#"):
        raise GraphError(f"@api name {path!r} of {function.__qualname__} is no path", hint='name it as in "chat/short"')
    verb = (http_method or "POST").upper()
    if verb not in VERBS:
        raise GraphError(f"@api method {http_method!r} of {function.__qualname__}: expected one of {', '.join(VERBS)}")
    setattr(function, ROUTE_MARK, Route(path, verb, function.__name__))


@overload
def api(function: F, /) -> F: ...
@overload
def api(*, name: str | None = None, http_method: str | None = None) -> Callable[[F], F]: ...
def api(function: Any = None, /, *, name: str | None = None, http_method: str | None = None) -> Any:
    """Answer `POST /<name>` of the service's HTTP server with this method, with or without parentheses.

    `name` is by default the method's; it may hold FastAPI's path parameters. Parameters are FastAPI's: a pydantic
    model is the JSON body, and what does not fit is answered with 422; a parameter without annotation is a key of the
    body. What the method returns is sent as JSON, a Starlette response as it is. What it yields is streamed: text as
    it is, anything else as server-sent events. Raises GraphError for a name or an HTTP method that cannot be.
    """

    def mark(method: Any) -> Any:
        mark_route(method, name, http_method)
        return method

    return mark if function is None else mark(function)


def routes(cls: type[Any]) -> list[Route]:
    """The routes of a class, inherited ones included; an override stays one, unless it is None.

    Raises GraphError when two methods have one path and HTTP method.
    """
    marked: dict[str, Route] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            route = getattr(value, ROUTE_MARK, None)
            if isinstance(route, Route):
                marked[name] = replace(route, method=name)
    found = [route for name, route in marked.items() if callable(getattr(cls, name))]
    taken: dict[tuple[str, str], str] = {}
    for route in found:
        other = taken.setdefault((route.verb, route.path), route.method)
        if other != route.method:
            raise GraphError(
                f"{cls.__name__}.{route.method}: {route.verb} {route.path} is answered by {cls.__name__}.{other} too",
                hint="give one of them another name",
            )
    return found

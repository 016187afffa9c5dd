"""`@api`: methods that serve HTTP requests. Marks only; `dynamo.http.api_app` mounts them in the service's process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar, overload

from dynamo.errors import GraphError
from dynamo.sdk.arguments import warn_ignored

F = TypeVar("F", bound=Callable[..., Any])

ROUTE_MARK = "__dynamo_route__"
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class DynamoTransport(Enum):
    """Values of `@endpoint(transports=[...])`: DEFAULT serves other services of the graph, HTTP does what `@api` does."""

    DEFAULT = "default"
    HTTP = "http"


@dataclass(frozen=True)
class Route:
    """An HTTP verb and path of the service, and the name of the method that serves it."""

    path: str
    verb: str
    method: str


def mark_route(function: Any, name: str | None, http_method: str | None) -> None:
    """Mark a method as an HTTP route. Raises GraphError for a non-method, an invalid path or an unknown HTTP verb."""
    if not inspect.isfunction(function):
        raise GraphError(f"@api goes on a method, not on a {type(function).__name__}")
    path = "/" + (function.__name__ if name is None else name).removeprefix("/")
    if not path.isprintable() or set(path) & set(" ?#"):
        raise GraphError(
            f"@api name {path!r} of {function.__qualname__} is not a valid path", hint='name it as in "chat/short"'
        )
    verb = (http_method or "POST").upper()
    if verb not in VERBS:
        raise GraphError(f"@api method {http_method!r} of {function.__qualname__}: expected one of {', '.join(VERBS)}")
    setattr(function, ROUTE_MARK, Route(path, verb, function.__name__))


@overload
def api(function: F, /) -> F: ...
@overload
def api(
    given: str | None = None, /, *, name: str | None = None, http_method: str | None = None
) -> Callable[[F], F]: ...
def api(function: Any = None, /, *, name: str | None = None, http_method: str | None = None, **ignored: Any) -> Any:
    """Serve `POST /<name>` of the service's HTTP server with this method; usable with or without parentheses.

    `name` defaults to the method's name and may contain FastAPI path parameters. Parameters follow FastAPI: a pydantic
    model is the JSON body, a parameter without annotation is a key of the body, and invalid input gets a 422. A return
    value is sent as JSON, a Starlette response unchanged. Yielded items are streamed: text as is, anything else as
    server-sent events. Other arguments warn and have no effect. Raises GraphError for an invalid name, a misspelled
    argument, or an unknown HTTP verb.
    """
    if isinstance(function, str):  # @api("name"), as in ai-dynamo 0.3
        function, name = None, function
    warn_ignored("@api", ignored, ("name", "http_method"))

    def mark(method: Any) -> Any:
        mark_route(method, name, http_method)
        return method

    return mark if function is None else mark(function)


def routes(cls: type[Any]) -> list[Route]:
    """Return the routes of a class, inherited ones included. An override remains a route unless it is None.

    Raises GraphError when two methods share a path and HTTP verb.
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
                f"{cls.__name__}.{route.method}: {route.verb} {route.path} is already served by {cls.__name__}.{other}",
                hint="rename one of them",
            )
    return found

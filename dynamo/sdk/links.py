"""Links: which service a graph module puts behind a dependency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from dynamo.errors import GraphError
from dynamo.sdk.depends import dependencies
from dynamo.sdk.spec import spec_of

U = TypeVar("U")


@dataclass(frozen=True)
class Edge:
    """`source.link(target)` in the module `graph`, which activates the dependency `attribute`."""

    source: type[Any]
    attribute: str
    target: type[Any]
    graph: str


EDGES: list[Edge] = []  # append-only; a graph reads the edges of its own module


def link(cls: type[Any], target: type[U], graph: str) -> type[U]:
    """Record in `EDGES` that the module `graph` puts `target` behind the dependency of `cls` that it fulfils.

    Return `target`. Raises GraphError when none or several dependencies fit.
    """
    spec_of(cls)
    spec_of(target)
    known = dependencies(cls)
    fits = [name for name, dependency in known.items() if dependency.on in target.__mro__]
    listed = ", ".join(f"{name} = {dependency!r}" for name, dependency in known.items()) or "none"
    if not fits:
        raise GraphError(
            f"{target.__name__} does not fulfill any dependencies required by {cls.__name__}",
            hint=f"dependencies of {cls.__name__}: {listed}",
        )
    exact = [name for name in fits if known[name].on is target]
    if len(exact) == 1:
        fits = exact
    if len(fits) > 1:
        raise GraphError(
            f"{target.__name__} fulfills multiple dependencies required by {cls.__name__}: {', '.join(fits)}",
            hint="give the dependencies different service classes",
        )
    EDGES.append(Edge(cls, fits[0], target, graph))
    return target

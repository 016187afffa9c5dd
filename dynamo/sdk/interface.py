"""Interfaces: services known by the endpoints that they must have. `AbstractService` is their base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo.errors import GraphError
from dynamo.sdk.api import routes
from dynamo.sdk.endpoint import endpoints

__all__ = ["abstract_endpoint", "check_interface"]

F = TypeVar("F", bound=Callable[..., Any])

ABSTRACT_MARK = "__dynamo_abstract__"

if TYPE_CHECKING:
    from abc import abstractmethod as abstract_endpoint  # type checkers then know that a class lacks an endpoint
else:

    def abstract_endpoint(method: F) -> F:
        """Whoever implements this interface has an `@endpoint` of this name; the body here is never run."""
        setattr(method, ABSTRACT_MARK, True)
        return abstractmethod(method)


def check_interface(cls: type[Any]) -> None:
    """GraphError (a TypeError too) when an abstract endpoint is missing, not decorated, or no method at all."""
    required = {name: base for base in cls.__mro__ for name, value in vars(base).items() if _abstract(value)}
    if not required:
        return
    served = {*endpoints(cls), *(route.method for route in routes(cls))}
    missing, plain, wrong = [], [], []
    for name in required:
        value = getattr(cls, name)
        if _abstract(value):
            missing.append(name)
        elif not callable(value):
            wrong.append(f"{name} must be callable, got {type(value).__name__}")
        elif name not in served:
            plain.append(name)
    problems = [f"missing implementation(s): {', '.join(sorted(missing))}"] if missing else []
    problems += [f"method(s) not decorated with @endpoint: {', '.join(sorted(plain))}"] if plain else []
    problems += sorted(wrong)
    if problems:
        names = ", ".join(dict.fromkeys(base.__name__ for base in required.values()))
        raise GraphError(
            f"{cls.__name__} violates Dynamo interface — {'; '.join(problems)}",
            hint=f"{cls.__name__} implements {names}: write these as @endpoint methods",
        )


def _abstract(value: object) -> bool:
    return bool(getattr(value, ABSTRACT_MARK, False))

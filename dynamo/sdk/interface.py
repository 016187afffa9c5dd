"""Interfaces: the endpoints that a service must have. `AbstractService` is their base class."""

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
        """Require an `@endpoint` of this name from every implementation; the body here is never run."""
        setattr(method, ABSTRACT_MARK, True)
        return abstractmethod(method)


def check_interface(cls: type[Any]) -> None:
    """Check that a class implements its interfaces.

    Raises GraphError (also a TypeError) when an abstract endpoint is missing, undecorated or not callable.
    """
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

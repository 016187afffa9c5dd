"""`@service`: declares a class as a service of a graph and returns the class itself."""

from __future__ import annotations

import inspect
import sys
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

from dynamo.errors import GraphError
from dynamo.sdk.api import routes
from dynamo.sdk.arguments import warn_ignored
from dynamo.sdk.channels import channels
from dynamo.sdk.endpoint import NAME, endpoints
from dynamo.sdk.interface import check_interface
from dynamo.sdk.links import link
from dynamo.sdk.spec import SPEC_MARK, Interface, Resources, ServiceSpec, spec_of

C = TypeVar("C", bound="type[Any]")
U = TypeVar("U")

DEFAULT_NAMESPACE = "dynamo"
_KNOWN = ("dynamo", "resources", "workers", "image", "envs", "app", "system_app")
HTTP_SETTINGS = ("host", "port")


class Service:
    """Optional base of a service class, so that type checkers know `link`, which `@service` adds in any case."""

    @classmethod
    def link(cls, target: type[U], /) -> type[U]:
        """Put `target` behind this service's dependency on it, in the graph that the calling module declares.

        Return `target`, so that links chain. Raises GraphError when none or several dependencies fit.
        """
        return link(cls, target, sys._getframe(1).f_globals.get("__name__", ""))

    @classmethod
    def dynamo_address(cls) -> tuple[str, str]:
        """Return (namespace, service name)."""
        return spec_of(cls).address


class AbstractService(Service, Interface, ABC):
    """Base class of interfaces: their methods are `@abstract_endpoint`; `depends()` names them, nothing serves them.

    A service that implements one derives from it, and `.link()` puts it behind the dependency.
    """


class_attributes: list[type[Any]] = [Service]
"""classes whose attributes a service class gets where it uses the name for nothing itself"""


def _add_attributes(cls: type[Any]) -> None:
    used = {name for base in cls.__mro__ for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    for source in class_attributes:
        for name, value in vars(source).items():
            if not name.startswith("__") and name not in used:
                setattr(cls, name, value)


def _take_http_settings(cls: type[Any]) -> None:
    """Accept `host` and `port` as settings of a service with an HTTP server, whether its constructor has them or not."""
    if hasattr(cls, "extra_settings") or cls.__init__ is object.__init__:
        return
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters):  # otherwise it accepts any key anyway
        cls.extra_settings = staticmethod(lambda: HTTP_SETTINGS)


def _parse_workers(given: object) -> int:
    """Return the number of workers; text is accepted, as in ai-dynamo 0.3. Raises GraphError below 1."""
    if not isinstance(given, bool) and isinstance(given, int | str):
        try:
            count = int(given)
        except ValueError:
            count = 0
        if count >= 1:
            return count
    raise GraphError(f"@service: workers: expected an integer of at least 1, found {given!r}")


def parse_envs(envs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> dict[str, str]:
    """Convert `{"A": 1}` or `[{"name": "A", "value": 1}]` to `{"A": "1"}`. Raises GraphError for any other form."""
    if not envs:
        return {}
    if isinstance(envs, Mapping):
        return {str(k): str(v) for k, v in envs.items()}
    try:
        return {str(e["name"]): str(e["value"]) for e in map(dict, envs)}
    except (KeyError, TypeError, ValueError):
        raise GraphError(
            f"@service: envs: expected a mapping or a list of name and value, found {envs!r}",
            hint='write {"NAME": "value"}',
        ) from None


@overload
def service(cls: C, /) -> C: ...
@overload
def service(
    *,
    dynamo: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
    workers: int = 1,
    image: str | None = None,
    envs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    app: Any = None,
    system_app: Any = None,
    **ignored: Any,
) -> Callable[[C], C]: ...
def service(
    cls: Any = None,
    /,
    *,
    dynamo: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
    workers: int = 1,
    image: str | None = None,
    envs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    app: Any = None,
    system_app: Any = None,
    **ignored: Any,
) -> Any:
    """Declare a class as a service; usable with or without parentheses. Returns the class itself.

    `dynamo` holds `namespace` (default "dynamo"), `component_type`, and keys of the 0.x SDK that have no effect.
    `resources` are per worker process and `workers` is their number; `ServiceArgs` in the configuration overrides both.
    `app` is the FastAPI application for `@api` methods, `system_app` the one for probes; by default new ones are made.
    Other arguments, which ai-dynamo 0.3 accepted, warn and have no effect. Raises GraphError for misspelled arguments,
    invalid values, or a class that violates its interface.
    """
    warn_ignored("@service", ignored, _KNOWN)
    count = _parse_workers(workers)
    options = dict(dynamo or {})
    namespace = options.get("namespace") or DEFAULT_NAMESPACE
    component_type = options.get("component_type")
    if not isinstance(namespace, str) or not NAME.fullmatch(namespace) or "/" in namespace:
        raise GraphError(f"@service: namespace {namespace!r}: letters, digits, '_' and '-' only")

    def declare(found: type[Any]) -> type[Any]:
        if not isinstance(found, type):
            raise GraphError(f"@service goes on a class, not on {type(found).__name__}")
        check_interface(found)
        spec = ServiceSpec(
            name=found.__name__,
            namespace=namespace,
            component_type=getattr(component_type, "value", component_type),
            resources=Resources.parse(dict(resources or {})),
            workers=count,
            image=image,
            envs=parse_envs(envs),
            app=app,
            endpoints=endpoints(found),
            routes=routes(found),
            system_app=system_app,
            channels=channels(found),
        )
        setattr(found, SPEC_MARK, spec)
        _add_attributes(found)
        if spec.routes or app is not None:
            _take_http_settings(found)
        return found

    return declare if cls is None else declare(cls)

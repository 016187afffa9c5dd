"""`@service`: declares a class as a service of a graph, and gives the same class back."""

from __future__ import annotations

import difflib
import inspect
import sys
import warnings
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard, TypeVar, overload

from dynamo.errors import GraphError
from dynamo.sdk.channels import Declared, channels
from dynamo.sdk.endpoint import NAME, EndpointSpec, endpoints
from dynamo.sdk.interface import check_interface
from dynamo.sdk.route import Route, routes

C = TypeVar("C", bound="type[Any]")
U = TypeVar("U")

_SPEC = "__dynamo_service__"
DEFAULT_NAMESPACE = "dynamo"
_IGNORED_IN_0_3 = {"traffic", "resource", "labels", "kubernetes_overrides", "logging", "ssl", "http"}
_KNOWN = ("dynamo", "resources", "workers", "image", "envs", "app", "system_app")
HTTP_SETTINGS = ("host", "port")


class Resources(NamedTuple):
    """Per worker process. `gpu` may be a fraction; `cpu` and `memory` are declarations for deployment tools."""

    gpu: float = 0.0
    cpu: str = "1"
    memory: str = "500Mi"

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Resources:
        try:
            gpu = float(given.get("gpu", 0) or 0)
        except (TypeError, ValueError):
            raise GraphError(f"resources.gpu: expected a number, found {given.get('gpu')!r}") from None
        return cls(gpu, str(given.get("cpu", "1")), str(given.get("memory", "500Mi")))


@dataclass(frozen=True)
class ServiceSpec:
    """What the decorator learned: plain data, no sockets."""

    name: str
    namespace: str
    component_type: str | None
    resources: Resources
    workers: int
    image: str | None
    envs: Mapping[str, str]
    app: Any
    endpoints: Mapping[str, EndpointSpec]  # by method name
    routes: Sequence[Route] = ()
    system_app: Any = None
    channels: Mapping[str, Declared] = field(default_factory=dict)  # by attribute

    @property
    def address(self) -> tuple[str, str]:
        return self.namespace, self.name


def spec_of(cls: type[Any]) -> ServiceSpec:
    """The declaration of a service class. Raises GraphError for a class that is not decorated itself."""
    spec = vars(cls).get(_SPEC) if isinstance(cls, type) else None
    if not isinstance(spec, ServiceSpec):
        name = cls.__name__ if isinstance(cls, type) else repr(cls)
        raise GraphError(f"{name} is not a service", hint=f"decorate class {name} with @service")
    return spec


def is_service(value: object) -> TypeGuard[type[Any]]:
    return isinstance(value, type) and isinstance(vars(value).get(_SPEC), ServiceSpec)


@dataclass(frozen=True)
class Edge:
    """`source.link(target)`, said in the module `graph`, which activates the dependency `attribute`."""

    source: type[Any]
    attribute: str
    target: type[Any]
    graph: str


EDGES: list[Edge] = []  # append-only; a graph reads the edges of its own module


class Service:
    """Optional base of a service class: it tells type checkers about `link`, which `@service` adds in any case."""

    @classmethod
    def link(cls, target: type[U], /) -> type[U]:
        """Activate this service's dependency that `target` fulfils, in the graph that the calling module declares.

        Returns `target`, so that links chain. Raises GraphError when none or several dependencies fit.
        """
        from dynamo.sdk.depends import dependencies  # depends needs this module's spec_of

        spec_of(cls)
        spec_of(target)
        known = dependencies(cls)
        fits = [name for name, dependency in known.items() if issubclass(target, dependency.on)]
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
        EDGES.append(Edge(cls, fits[0], target, sys._getframe(1).f_globals.get("__name__", "")))
        return target

    @classmethod
    def dynamo_address(cls) -> tuple[str, str]:
        """(namespace, service name)."""
        return spec_of(cls).address


class AbstractService(Service, ABC):
    """Base of an interface: a class whose methods are `@abstract_endpoint`, named in `depends()` and never served.

    A service that implements it derives from it, and is put behind the dependency by `.link()`.
    """


def is_interface(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, AbstractService) and not is_service(value)


class _OfClass:
    """An attribute that only the class has; on instances the name stays free for the author."""

    def __init__(self, read: Callable[[type[Any]], Any]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type[Any]) -> Any:
        if instance is not None or not is_service(owner):
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self._name!r}")
        return self._read(owner)


def _active_dependencies(cls: type[Any]) -> dict[str, Any]:
    from dynamo.sdk.depends import dependencies

    mine = {edge.attribute for edge in EDGES if edge.source is cls}
    linked = any(cls in (edge.source, edge.target) for edge in EDGES)
    return {name: found for name, found in dependencies(cls).items() if name in mine or not (linked or found.optional)}


def _all_services(cls: type[Any]) -> dict[str, type[Any]]:
    from dynamo.sdk.graph import build

    return build(cls.__name__, cls, list(EDGES)).services


class _ServiceObject:
    """What graphs and tests of ai-dynamo 0.1 to 0.3 read from the object that stood in a service class's place."""

    inner = _OfClass(lambda cls: cls)
    name = _OfClass(lambda cls: spec_of(cls).name)
    config = _OfClass(spec_of)
    dependencies = _OfClass(_active_dependencies)
    get_dynamo_endpoints = _OfClass(lambda cls: lambda: {e.name: e for e in spec_of(cls).endpoints.values()})
    all_services = _OfClass(lambda cls: lambda: _all_services(cls))


def _add_attributes(cls: type[Any]) -> None:
    """`link`, `dynamo_address` and those of `_ServiceObject`, where the class uses the name for nothing itself."""
    used = {name for base in cls.__mro__ for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    for source in (Service, _ServiceObject):
        for name, value in vars(source).items():
            if not name.startswith("__") and name not in used:
                setattr(cls, name, value)


def _take_http_settings(cls: type[Any]) -> None:
    """`host` and `port` are settings of every service with an HTTP server, whether its constructor has them or not."""
    if hasattr(cls, "extra_settings") or cls.__init__ is object.__init__:
        return
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters):  # else it takes any key in any case
        cls.extra_settings = staticmethod(lambda: HTTP_SETTINGS)


def parse_envs(envs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> dict[str, str]:
    """`{"A": 1}` or `[{"name": "A", "value": 1}]` -> `{"A": "1"}`."""
    if not envs:
        return {}
    if isinstance(envs, Mapping):
        return {str(k): str(v) for k, v in envs.items()}
    try:
        return {str(e["name"]): str(e["value"]) for e in envs}
    except (KeyError, TypeError):
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
    """Declare a class as a service, with or without parentheses. The class itself comes back.

    `dynamo`: `namespace` (default "dynamo"), `component_type`, and others of the 0.x SDK that have no effect.
    `resources` and `workers` are per service and count; `ServiceArgs` in the configuration overrides them. `app` is the
    FastAPI application for `@api` methods, `system_app` that for probes; without them there are new ones.
    """
    for name in ignored:
        if name not in _IGNORED_IN_0_3:
            near = difflib.get_close_matches(name, _KNOWN, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_KNOWN)}"
            raise GraphError(f"@service: unknown argument {name!r}", hint=hint)
        warnings.warn(f"@service: {name!r} has no effect, as in ai-dynamo 0.3", stacklevel=2)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise GraphError(f"@service: workers: expected an integer of at least 1, found {workers!r}")
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
            resources=Resources.parse(resources or {}),
            workers=workers,
            image=image,
            envs=parse_envs(envs),
            app=app,
            endpoints=endpoints(found),
            routes=routes(found),
            system_app=system_app,
            channels=channels(found),
        )
        setattr(found, _SPEC, spec)
        _add_attributes(found)
        if spec.routes or app is not None:
            _take_http_settings(found)
        return found

    return declare if cls is None else declare(cls)

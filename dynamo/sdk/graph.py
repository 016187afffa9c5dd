"""A graph: the services that an entry needs, found from `depends()` and the links of one module."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from dynamo.errors import GraphError
from dynamo.sdk import graph_import
from dynamo.sdk.calls import check_calls
from dynamo.sdk.depends import dependencies
from dynamo.sdk.links import EDGES, Edge
from dynamo.sdk.spec import is_interface, is_service, spec_of


@dataclass(frozen=True)
class Graph:
    """The services of a graph, dependencies first and the entry last; `targets` maps service -> attribute -> service."""

    spec: str
    entry: type[Any]
    services: dict[str, type[Any]]
    targets: dict[str, dict[str, type[Any]]]

    def service(self, name: str) -> type[Any]:
        if name not in self.services:
            near = difflib.get_close_matches(name, self.services, 1)
            raise GraphError(
                f"{self.spec} has no service {name!r}",
                hint=(f"did you mean {near[0]}? " if near else "")
                + f"services of this graph: {', '.join(self.services)}",
            )
        return self.services[name]


def load(spec: str, working_dir: Path = Path()) -> Graph:
    """Load the graph of `module:Service`, `path/file.py:Service` or a module with one root service.

    Raises GraphError when something is not found; an exception raised by the module's own code passes through.
    """
    name, _, attribute = spec.partition(":")
    module = _import(name, working_dir)
    edges = [edge for edge in EDGES if edge.graph == module.__name__] or list(EDGES)
    entry = _attribute(module, attribute) if attribute else _root(module, edges)
    return build(spec, entry, edges)


def build(spec: str, entry: type[Any], edges: list[Edge]) -> Graph:
    """Collect the services from the entry along active dependencies.

    Raises GraphError on a cycle, two services of one name, or a call to a method that is no endpoint.
    """
    linked: dict[type[Any], dict[str, type[Any]]] = {}
    ends: set[type[Any]] = set()
    conflicts: dict[type[Any], str] = {}
    for edge in edges:
        chosen = linked.setdefault(edge.source, {}).setdefault(edge.attribute, edge.target)
        if chosen is not edge.target:
            conflicts.setdefault(
                edge.source, f"{edge.attribute} is linked to {chosen.__name__} and to {edge.target.__name__}"
            )
        ends |= {edge.source, edge.target}
    services: dict[str, type[Any]] = {}
    targets: dict[str, dict[str, type[Any]]] = {}
    path: list[type[Any]] = []

    def visit(cls: type[Any]) -> None:
        if is_interface(cls):
            user = path[-1].__name__
            raise GraphError(
                f"{spec}: Service {cls.__name__} is not servable. Please use link to override with a concrete "
                f"implementation: {user} depends on an interface",
                hint=f"add {user}.link(<a service that is a {cls.__name__}>) to the graph module",
            )
        name = spec_of(cls).name
        if cls in path:
            cycle = " -> ".join(c.__name__ for c in [*path[path.index(cls) :], cls])
            raise GraphError(f"{spec}: services depend on each other in a cycle: {cycle}", hint="remove one link")
        if name in services:
            if services[name] is not cls:
                raise GraphError(
                    f"{spec}: two services are named {name}: {services[name].__module__} and {cls.__module__}",
                    hint="rename one of the classes",
                )
            return
        if cls in conflicts:
            raise GraphError(f"{spec}: {cls.__name__}.{conflicts[cls]}", hint="keep one of the links")
        path.append(cls)
        # a service that takes part in any link starts its linked dependencies only
        active = linked.get(cls, {}) if cls in ends else _needed(cls)
        targets[name] = active
        for target in active.values():
            visit(target)
        path.pop()
        services[name] = cls

    visit(entry)
    _connect_running(services, targets)
    services = _dependencies_first(entry, targets)
    for name, cls in services.items():
        check_calls(cls, targets[name])
    return Graph(spec, entry, services, targets)


def _connect_running(services: dict[str, type[Any]], targets: dict[str, dict[str, type[Any]]]) -> None:
    """Add to `targets` the dependencies without a link whose service another link brings in, unless they close a cycle.

    In `Frontend.link(Processor).link(Router).link(Worker)` the Processor may call the Worker, too: ai-dynamo called a
    dependency by its address, and links chose only what starts.
    """

    def reaches(source: type[Any], target: type[Any]) -> bool:
        return source is target or any(reaches(cls, target) for cls in targets[spec_of(source).name].values())

    running = set(services.values())
    for name, cls in services.items():
        for attribute, on in _needed(cls).items():
            if attribute not in targets[name] and on in running and not reaches(on, cls):
                targets[name][attribute] = on


def _dependencies_first(entry: type[Any], targets: dict[str, dict[str, type[Any]]]) -> dict[str, type[Any]]:
    ordered: dict[str, type[Any]] = {}

    def visit(cls: type[Any]) -> None:
        name = spec_of(cls).name
        if name not in ordered:
            for target in targets[name].values():
                visit(target)
            ordered[name] = cls

    visit(entry)
    return ordered


def _needed(cls: type[Any]) -> dict[str, type[Any]]:
    return {attribute: found.on for attribute, found in dependencies(cls).items() if not found.optional}


def load_function(spec: str, working_dir: Path = Path()) -> Callable[..., Any]:
    """Load `module:function` or `path/file.py:function`. Raises GraphError when it is not found or cannot be called."""
    name, _, attribute = spec.rpartition(":")
    if not name or not attribute.isidentifier():
        raise GraphError(
            f"{spec!r}: expected module:function", hint="write it as module:function or path/file.py:function"
        )
    module = _import(name, working_dir)
    found = getattr(module, attribute, None)
    if not callable(found):
        names = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        what = "not found" if found is None else f"a {type(found).__name__}, not a function"
        raise GraphError(f"{spec}: {what}", hint=f"functions there: {', '.join(names) or 'none'}")
    return cast("Callable[..., Any]", found)


def _import(name: str, working_dir: Path) -> ModuleType:
    """Import `package.module` or `path/file.py`. Raises GraphError where it, or a module that it needs, is missing."""
    is_file = name.endswith(".py")
    if not is_file and not all(part.isidentifier() for part in name.split(".")):
        raise GraphError(
            f"{name!r} is not a module name", hint="write it as graphs.agg:Frontend or path/file.py:Frontend"
        )
    graph_import.install(working_dir)
    if not is_file:
        graph_import.check(name, working_dir)
    try:
        return _import_file(name, working_dir) if is_file else importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing_module(name, error, working_dir) from error
    except ImportError as error:
        hint = graph_import.stand_in(error, working_dir, name)
        if not hint:
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno}"
        raise GraphError(f"graph module {name!r} cannot be imported: {place}: {error.msg}", hint=hint) from error


def _missing_module(name: str, error: ModuleNotFoundError, working_dir: Path) -> GraphError:
    """Return the error for a graph module `name` whose import failed because a module was not found."""
    missing = error.name or ""
    if name == missing or name.startswith(f"{missing}."):
        top, file = name.partition(".")[0], Path(*name.split(".")).with_suffix(".py")
        if top in sys.stdlib_module_names and (working_dir / file).is_file():
            return GraphError(
                f"graph module {name!r} not found: {top} is Python's own",
                hint=f"rename {top}, or name the file: {file}",
            )
        return GraphError(
            f"graph module {name!r} not found",
            hint=f"run from the directory that holds it, or pass --working-dir (now {working_dir.resolve()})",
        )
    kind, package = "file" if name.endswith(".py") else "module", missing.partition(".")[0]
    if package in sys.modules:
        fact, hint = "does not exist", f"look for it in {package}"
    else:
        fact, hint = "is not installed", f"pip install {package}"
    hint = "; ".join(filter(None, [hint, graph_import.stand_in(error, working_dir, name)]))
    return GraphError(f"graph {kind} {name!r} cannot be imported: it needs module {missing!r}, which {fact}", hint=hint)


def _import_file(name: str, working_dir: Path) -> ModuleType:
    path = (working_dir / name).resolve()
    if not path.is_file():
        raise GraphError(f"graph file {name} does not exist", hint=f"paths are relative to {working_dir.resolve()}")
    directory, module_name = str(path.parent), path.stem
    taken = sys.modules.get(module_name)
    if taken is not None and getattr(taken, "__file__", None) == str(path):
        return taken
    if taken is not None or module_name in sys.stdlib_module_names:
        module_name = f"graph_{module_name}"  # types.py, say, must not take the place of the library's
    found = importlib.util.spec_from_file_location(module_name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _attribute(module: ModuleType, attribute: str) -> type[Any]:
    """Return the service `Frontend` of a module, or `Frontend.middle`, the service behind a dependency of it."""
    attribute, _, path = attribute.partition(".")
    found: Any = getattr(module, attribute, None)
    if not is_service(found):
        names = sorted(name for name, value in vars(module).items() if is_service(value))
        what = "not found" if found is None else f"a {type(found).__name__}, not a service"
        raise GraphError(f"{module.__name__}:{attribute}: {what}", hint=f"services there: {', '.join(names) or 'none'}")
    for step in filter(None, path.split(".")):
        known = dependencies(found)
        if step not in known:
            raise GraphError(
                f"{module.__name__}:{attribute}.{path}: {found.__name__} has no dependency {step!r}",
                hint=f"dependencies: {', '.join(known) or 'none'}",
            )
        found = known[step].on
    return cast("type[Any]", found)


def _root(module: ModuleType, edges: list[Edge]) -> type[Any]:
    services = {name: value for name, value in vars(module).items() if is_service(value)}
    reached = {edge.target for edge in edges}
    reached |= {dep.on for cls in services.values() for dep in dependencies(cls).values()}
    roots = list({cls: name for name, cls in services.items() if cls not in reached}.values())
    if len(roots) != 1:
        raise _no_single_root(module, roots, services)
    return services[roots[0]]


def _no_single_root(module: ModuleType, roots: list[str], services: dict[str, type[Any]]) -> GraphError:
    if not services:
        return GraphError(f"module {module.__name__} has no services", hint="decorate a class in it with @service")
    found = f"several root services: {', '.join(roots)}" if roots else "no root service"
    first = (roots or list(services))[0]
    return GraphError(f"module {module.__name__} has {found}", hint=f"name one: {module.__name__}:{first}")

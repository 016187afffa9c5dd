"""Static check of the calls between services: `self.worker.method(...)` needs an `@endpoint`."""

from __future__ import annotations

import ast
import dis
import inspect
from collections.abc import Collection, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from dynamo.errors import EndpointMissingError
from dynamo.sdk.depends import no_endpoint
from dynamo.sdk.spec import spec_of


class Call(NamedTuple):
    """`self.<attribute>.<method>(...)` in a source file; `line` counts from 1."""

    attribute: str
    method: str
    file: str
    line: int


GUARDS = {"hasattr", "AttributeError"}
"""Names used by a function that checks for a method before or when it calls it."""


def check_calls(cls: type[Any], targets: Mapping[str, type[Any]]) -> None:
    """Check the methods of a service for calls of plain methods of the services behind its dependencies.

    `targets` maps attribute -> service. Only methods that the target class has, and that are neither endpoint nor
    channel, are refused: other names may come from a subclass. Attributes that the class assigns are not checked, nor
    functions that look first (`hasattr`, `except AttributeError`): there may be a plain object. Raises
    EndpointMissingError with the place of the call.
    """
    assigned = _assigned(cls, targets.keys())
    plain = {attribute: _plain_methods(targets[attribute]) for attribute in targets.keys() - assigned}
    for name in dir(cls):
        function = inspect.getattr_static(cls, name)
        if not inspect.isfunction(function):
            continue
        used = _names(function.__code__)
        if not used.isdisjoint(GUARDS):
            continue
        if not any(attribute in used and not methods.isdisjoint(used) for attribute, methods in plain.items()):
            continue  # most functions: their source is not read
        for call in _calls(function):
            if call.method in plain.get(call.attribute, ()):
                error = no_endpoint(spec_of(targets[call.attribute]), call.method)
                raise EndpointMissingError(f"{call.file}:{call.line}: {error.message}", hint=error.hint)


def _assigned(cls: type[Any], attributes: Collection[str]) -> set[str]:
    """Return the attributes that a method of the class or its bases assigns."""
    found: set[str] = set()
    for function in (value for base in cls.__mro__ for value in vars(base).values() if inspect.isfunction(value)):
        if not _names(function.__code__).isdisjoint(attributes):
            found |= _stores(function.__code__)
    return found


def _stores(code: CodeType) -> set[str]:
    """Return the attribute names that a function assigns, nested functions included."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    return own.union(*(_stores(constant) for constant in code.co_consts if isinstance(constant, CodeType)))


def _plain_methods(target: type[Any]) -> set[str]:
    """Return the names of a service's methods that other services cannot call."""
    spec = spec_of(target)
    methods = {name for name in dir(target) if inspect.isfunction(inspect.getattr_static(target, name))}
    return methods - spec.endpoints.keys() - spec.channels.keys()


def _names(code: CodeType) -> set[str]:
    """Return the global and attribute names that a function uses, nested functions included."""
    nested = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)


def _calls(function: FunctionType) -> Iterator[Call]:
    """Yield the calls `self.x.y(...)` in a method; none without its source."""
    try:
        lines, first = inspect.getsourcelines(function)
        # the line before makes any indentation valid; dedenting fails for text at the margin
        tree = ast.parse("if True:\n" + "".join(lines) if lines[0][:1].isspace() else "\n" + "".join(lines))
    except (OSError, SyntaxError):  # generated, or from a C extension
        return
    file = inspect.getsourcefile(function) or "?"
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr=attribute), attr=method)
            ):
                yield Call(attribute, method, file, first + node.lineno - 2)

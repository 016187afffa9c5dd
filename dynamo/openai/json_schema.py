"""A look at a JSON Schema before an engine gets it: what cannot be a schema is the client's mistake and says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")

_SCHEMA = ("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("$defs", "definitions", "patternProperties", "properties")
_NUMBERS = ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf")
_COUNTS = ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")
_STRINGS = ("$id", "$ref", "$schema", "description", "format", "pattern", "title")
MAX_DEPTH = 64


def fault(schema: Any, path: str, depth: int = 0) -> tuple[str, str] | None:
    """Where a schema is wrong and why, as (path, reason); None where nothing was found. Keywords unknown here pass.

    JSON Schema 2020-12 and its predecessors; `path` is the parameter that holds the schema.
    """
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, Mapping):
        return path, "a schema is an object"
    if depth > MAX_DEPTH:
        return path, f"nested more than {MAX_DEPTH} deep"
    return _own_fault(schema, path) or _inner_fault(schema, path, depth)


def _own_fault(schema: Mapping[str, Any], path: str) -> tuple[str, str] | None:
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in TYPES:
            return f"{path}.type", f"{kind!r} is no type; types are {', '.join(TYPES)}"
    for name in _NUMBERS:
        if name in schema and (isinstance(schema[name], bool) or not isinstance(schema[name], int | float)):
            # draft 4 had booleans here
            if name.startswith("exclusive") and isinstance(schema[name], bool):
                continue
            return f"{path}.{name}", "expected a number"
    for name in _COUNTS:
        value = schema.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return f"{path}.{name}", "expected an integer of at least 0"
    for name in _STRINGS:
        if not isinstance(schema.get(name, ""), str):
            return f"{path}.{name}", "expected a string"
    required = schema.get("required", [])
    if not isinstance(required, bool) and not _strings(required):  # draft 3 had booleans here
        return f"{path}.required", "expected an array of strings"
    if "enum" in schema and not (isinstance(schema["enum"], list) and schema["enum"]):
        return f"{path}.enum", "expected an array of at least one value"
    return None


def _inner_fault(schema: Mapping[str, Any], path: str, depth: int) -> tuple[str, str] | None:
    inner: list[tuple[str, Any]] = []
    for name in _SCHEMA:
        if name in schema:
            value = schema[name]
            several = name == "items" and isinstance(value, list)  # a tuple, before 2020-12
            inner += [(f"{name}.{i}", each) for i, each in enumerate(value)] if several else [(name, value)]
    for name in _SCHEMAS:
        if name in schema:
            if not isinstance(schema[name], list) or not schema[name]:
                return f"{path}.{name}", "expected an array of at least one schema"
            inner += [(f"{name}.{i}", each) for i, each in enumerate(schema[name])]
    for name in _NAMED:
        if name in schema:
            if not isinstance(schema[name], Mapping):
                return f"{path}.{name}", "expected an object of schemas"
            inner += [(f"{name}.{key}", each) for key, each in schema[name].items()]
    for name, each in inner:
        found = fault(each, f"{path}.{name}", depth + 1)
        if found is not None:
            return found
    return None


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)

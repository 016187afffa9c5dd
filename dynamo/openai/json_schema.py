"""A check of the JSON Schemas that clients send, before an engine compiles them.

The jsonschema library checks against a metaschema of our own instead of draft 2020-12's, for two reasons. It accepts the
forms of older drafts: a tuple in `items`, booleans in `exclusiveMinimum` and `required`. And it takes 11 µs for each
subschema, the official one 220, which would let a client block the event loop for minutes.
"""

from __future__ import annotations

import functools
from typing import Any

from dynamo.text import shorten

_SCHEMA = {"$ref": "#"}
_SCHEMAS = {"type": "array", "minItems": 1, "items": _SCHEMA}
_NAMED_SCHEMAS = {"type": "object", "additionalProperties": _SCHEMA}
_TYPE = {"enum": ["array", "boolean", "integer", "null", "number", "object", "string"]}
_NUMBER = {"type": "number"}
_NUMBER_OR_BOOLEAN = {"type": ["number", "boolean"]}
_COUNT = {"type": "integer", "minimum": 0}
_STRING = {"type": "string"}


def _each(keywords: str, schema: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(keywords.split(), schema)


METASCHEMA: dict[str, Any] = {
    "type": ["object", "boolean"],
    "properties": {
        "type": {"if": {"type": "array"}, "then": {"items": _TYPE}, "else": _TYPE},
        "enum": {"type": "array", "minItems": 1},
        "required": {"type": ["array", "boolean"], "items": _STRING},
        "items": {"if": {"type": "array"}, "then": {"items": _SCHEMA}, "else": _SCHEMA},
        **_each("maximum minimum multipleOf", _NUMBER),
        **_each("exclusiveMaximum exclusiveMinimum", _NUMBER_OR_BOOLEAN),
        **_each("maxItems maxLength maxProperties minItems minLength minProperties", _COUNT),
        **_each("$id $ref $schema description format pattern title", _STRING),
        **_each("additionalProperties contains else if not propertyNames then", _SCHEMA),
        **_each("allOf anyOf oneOf prefixItems", _SCHEMAS),
        **_each("$defs definitions patternProperties properties", _NAMED_SCHEMAS),
    },
}
MAX_NESTING = 128
"""Levels of objects and arrays: the validator is recursive, and so are the engines' compilers."""
MAX_REASON_CHARS = 200


@functools.cache
def _validator() -> Any:
    # takes 70 ms to import, and few requests have a schema
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

    return Draft202012Validator(METASCHEMA)


def find_error(schema: Any, path: str) -> tuple[str, str] | None:
    """Return the first error of a JSON Schema as (path, reason), or None. Unknown keywords are ignored.

    `path` is the parameter that holds the schema; paths of errors begin with it.
    """
    if _is_nested_deeply(schema):
        return path, f"nested more than {MAX_NESTING} deep"
    error = next(_validator().iter_errors(schema), None)
    if error is None:
        return None
    return ".".join([path, *map(str, error.absolute_path)]), shorten(error.message, MAX_REASON_CHARS)


def _is_nested_deeply(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        objects = [inner for each in level if isinstance(each, dict) for inner in each.values()]
        level = objects + [inner for each in level if isinstance(each, list) for inner in each]
        if not level:
            return False
    return True

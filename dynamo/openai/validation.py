"""Validation of request bodies by pydantic models, with errors in OpenAI's words that name the parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dynamo.errors import RequestError

M = TypeVar("M", bound=BaseModel)

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_TYPES = {"str", "int", "float", "bool"}
_LIMITS = {
    "greater_than_equal": ("below the minimum", ">=", "ge"),
    "greater_than": ("below the minimum", ">", "gt"),
    "less_than_equal": ("above the maximum", "<=", "le"),
    "less_than": ("above the maximum", "<", "lt"),
}


def parse(kind: type[M], body: bytes) -> M:
    """Parse a JSON body into a model. Raises RequestError for invalid JSON, and for the first invalid field."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise RequestError(
            "We could not parse the JSON body of your request.", hint="send a JSON object, encoded in UTF-8"
        ) from None
    if not isinstance(given, dict):
        raise RequestError(f"The request body must be a JSON object, but it is {type_in_words(given)}.")
    try:
        # null is the same as not given: clients send their whole set of options
        return kind.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False, include_context=True)) from None


def type_in_words(value: object) -> str:
    """Return the type of a JSON value in words, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def _path(error: ErrorDetails) -> str:
    """Return the field's path, `messages.0.role`, without the names that pydantic gives to alternatives of a union."""
    parts = [part for part in error["loc"] if isinstance(part, int) or (part.isidentifier() and part not in _TYPES)]
    return ".".join(map(str, parts))


def _request_error(errors: Sequence[ErrorDetails]) -> RequestError:
    first = errors[0]
    path = _path(first)
    same = [error for error in errors if _path(error) == path]  # alternatives of one field
    expected = list(dict.fromkeys(_EXPECTED[e["type"]] for e in same if e["type"] in _EXPECTED))
    context: Mapping[str, Any] = first.get("ctx") or {}
    value, kind = first["input"], first["type"]
    if kind == "missing":
        return RequestError(f"Missing required parameter: '{path}'.", param=path)
    if expected:
        wanted = " or ".join(expected)
        return RequestError(
            f"Invalid type for '{path}': expected {wanted}, but got {type_in_words(value)}.", param=path
        )
    if kind in _LIMITS:
        where, sign, name = _LIMITS[kind]
        return RequestError(
            f"Invalid value for '{path}': {where}. Expected a value {sign} {context[name]}, but got {value}.",
            param=path,
        )
    if kind in ("too_long", "too_short"):
        word, limit = ("at most", "max_length") if kind == "too_long" else ("at least", "min_length")
        found = context["actual_length"]
        return RequestError(
            f"Invalid '{path}': expected an array of {word} {context[limit]}, but got {found}.", param=path
        )
    if kind == "literal_error":
        return RequestError(f"Invalid value for '{path}': {value!r:.80}. Supported: {context['expected']}.", param=path)
    reason = {
        "string_pattern_mismatch": f"it must match {context.get('pattern')}",
        "string_too_short": "it is empty",
        "value_error": str(context.get("error")),  # one of our own validators
    }.get(kind, "not accepted")
    return RequestError(f"Invalid value for '{path}': {reason}.", param=path)

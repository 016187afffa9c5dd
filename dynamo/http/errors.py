"""The one error body of all HTTP servers here: OpenAI's `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
from typing import Any

import orjson
from starlette.exceptions import HTTPException

from dynamo.errors import DynamoError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 1


def status_of(error: BaseException) -> int:
    """Return the HTTP status that an exception stands for; 500 for bugs."""
    if isinstance(error, DynamoError):
        return error.status
    return error.status_code if isinstance(error, HTTPException) else 500


def is_expected(error: BaseException) -> bool:
    """Return True for errors raised on purpose; any other is a bug and is logged with its traceback."""
    return isinstance(error, DynamoError | HTTPException)


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """Return the JSON body of an error; `kind` is OpenAI's `type`."""
    message = message.encode("utf-8", "replace").decode()  # JSON has no lone surrogates, Python's strings may have
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_type(status: int) -> str:
    """Return OpenAI's `type` for an HTTP status."""
    return _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")


def body(error: BaseException) -> bytes:
    """Return the JSON body for an exception. The message of a DynamoError includes its hint."""
    kind = error_type(status_of(error))
    if isinstance(error, DynamoError):
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        return error_body(message, kind, param=error.param, code=error.code)
    if isinstance(error, HTTPException):
        return error_body(_detail(error.detail), kind)
    return error_body(f"{type(error).__name__}: {error}", kind, code="internal_error")


def _detail(detail: Any) -> str:
    """Return the text of an HTTPException's detail; FastAPI allows any value there, which is shown as JSON."""
    return detail if isinstance(detail, str) else json.dumps(detail, default=str, ensure_ascii=False)


def headers(error: BaseException) -> list[tuple[bytes, bytes]]:
    """Return the error's own headers, and `retry-after` for 429 and 503, on which clients wait and try again."""
    given = (error.headers or {}) if isinstance(error, HTTPException) else {}
    found = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
    if status_of(error) in (429, 503) and not any(name == b"retry-after" for name, _ in found):
        found.append((b"retry-after", b"%d" % RETRY_AFTER_S))
    return found

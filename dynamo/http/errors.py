"""Errors as OpenAI's envelope: what clients parse."""

from __future__ import annotations

import logging
from typing import Any

import orjson

from dynamo.errors import DynamoError

log = logging.getLogger(__name__)

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
          413: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip
RETRY_AFTER_S = 1


def status_of(error: BaseException) -> int:
    return error.status if isinstance(error, DynamoError) else 500


def envelope(error: BaseException) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; the message keeps the hint."""
    status = status_of(error)
    if isinstance(error, DynamoError):
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        param, code = error.param, error.code
    else:
        message, param, code = f"{type(error).__name__}: {error}", None, "internal_error"
    return {
        "error": {"message": message, "type": _TYPES.get(status, "server_error"), "param": param, "code": code},
    }


def body(error: BaseException) -> bytes:
    return orjson.dumps(envelope(error))


def headers(error: BaseException) -> list[tuple[bytes, bytes]]:
    """Clients wait and try again after 429 and 503."""
    return [(b"retry-after", b"%d" % RETRY_AFTER_S)] if status_of(error) in (429, 503) else []


def report(error: BaseException) -> None:
    """Log what is the server's fault: our own errors in a line, others are bugs and keep their traceback."""
    if not isinstance(error, DynamoError):
        log.error("failed: %r", error, exc_info=error)
    elif error.status >= 500:
        log.warning("%s", " ".join(str(error).splitlines()))

"""Exception handlers that give every failure of a FastAPI or Starlette application the body of `dynamo.http.errors`.

Handlers that the author of the application has registered take precedence.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import exception_handlers as fastapi_defaults
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dynamo.errors import DynamoError, RequestError
from dynamo.http import errors
from dynamo.http.access_log import log_rejected
from dynamo.http.middleware import elapsed_s

_REPLACED = (fastapi_defaults.http_exception_handler, fastapi_defaults.request_validation_exception_handler)
"""FastAPI registers these in every application; they answer `{"detail": ...}`."""
MAX_REPORTED_PROBLEMS = 5


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error, for the OpenAPI schema."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorResponse, "description": "Error"}}
"""FastAPI's `responses` of a route; they replace the 422 that it documents by itself."""


def add_error_handlers(app: Starlette) -> None:
    """Register the handlers below, each unless the application has one of its own for that kind of exception."""
    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
        DynamoError: dynamo_error,
        HTTPException: http_exception,
        RequestValidationError: validation_error,
    }
    if 500 not in app.exception_handlers:  # Starlette has one place for both of them
        handlers[Exception] = unexpected_error
    for kind, handler in handlers.items():
        if app.exception_handlers.get(kind) in (None, *_REPLACED):
            app.add_exception_handler(kind, handler)


def place(request: Request) -> str:
    """Return the method and path of a request, as the log shows them."""
    return f"{request.method} {request.url.path}"


async def dynamo_error(request: Request, error: DynamoError) -> Response:
    """Answer with the error's own status."""
    _log(request, error)
    return _response(errors.status_of(error), errors.body(error), _headers(error))


async def unexpected_error(_: Request, error: Exception) -> Response:
    """Answer 500. Starlette raises the exception again; `RequestIds` logs it."""
    return _response(500, errors.body(error))


async def http_exception(request: Request, error: HTTPException) -> Response:
    """Answer an HTTPException: the router's for unknown paths and methods, or one that the application raised."""
    status, headers = error.status_code, _headers(error)
    if status < 200 or status in (204, 205, 304):  # these have no body
        return Response(status_code=status, headers=headers)
    if status == 404 and request.scope.get("endpoint") is None:  # no route matched
        docs = getattr(request.app, "docs_url", None)
        text = f"Unknown request URL: {place(request)}.{f' See {docs}.' if docs else ''}"
        _log(request, RequestError(text), status=status, level=logging.DEBUG)
        body = errors.error_body(text, "invalid_request_error", code="unknown_url")
    elif status == 405 and "allow" in headers:
        text = f"{request.method} is not allowed on {request.url.path}; use {headers['allow']}."
        _log(request, RequestError(text), status=status)
        body = errors.error_body(text, "invalid_request_error", code="method_not_allowed")
    else:
        _log(request, error)
        body = errors.body(error)
    return _response(status, body, headers)


async def validation_error(request: Request, error: RequestValidationError) -> Response:
    """Answer 422 with where each problem is and what it is: `body.text: Field required`."""
    problems = error.errors()
    shown = [_shown_problem(problem) for problem in problems[:MAX_REPORTED_PROBLEMS]]
    if len(problems) > MAX_REPORTED_PROBLEMS:
        shown.append(f"{len(problems) - MAX_REPORTED_PROBLEMS} more")
    text = "Invalid request: " + "; ".join(shown)
    _log(request, RequestError(text), status=422)
    return _response(
        422, errors.error_body(text, "invalid_request_error", param=_param(problems[0]) if problems else None)
    )


def _param(problem: Mapping[str, Any]) -> str | None:
    """Return the parameter's path without `body` or `query` in front; None for the body as a whole."""
    return None if problem["type"] == "json_invalid" else ".".join(map(str, problem["loc"][1:])) or None


def _shown_problem(problem: Mapping[str, Any]) -> str:
    reason = problem["msg"]
    if problem["type"] == "json_invalid":
        cause = (problem.get("ctx") or {}).get("error")
        return f"the body is not JSON: {cause or reason}"
    return f"{'.'.join(map(str, problem['loc']))}: {reason}"


def _log(request: Request, error: Exception, *, status: int | None = None, level: int | None = None) -> None:
    log_rejected(place(request), error, elapsed_s(request.scope), status=status, level=level)


def _headers(error: Exception) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in errors.headers(error)}


def _response(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")

"""The access log: one line for each request, when it has ended.

    chat_completions dynamo-tiny stream: 200 in 0.061 s, first token after 0.021 s, tokens 10 in (0 cached), 8 out
    chat_completions dynamo-tiny: 503 in 0.002 s: no instance of dynamo.VllmWorker.generate is available
    GET /v1/model: 404 in 0.000 s: Unknown request URL: GET /v1/model. See /docs.

Level info; warning where the server is at fault; error for bugs, with the traceback unless another process has logged it.
So `DYN_LOG=dynamo.http.access_log=warning` leaves out successful requests. Unknown URLs are logged at debug, since
scanners try thousands of them. Prompts and answers are never logged.
"""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple

from starlette.exceptions import HTTPException

from dynamo.errors import DynamoError
from dynamo.http.errors import is_expected, status_of
from dynamo.rpc.remote_errors import raised_in_another_process
from dynamo.text import shorten

log = logging.getLogger(__name__)

ERROR_CHARS = 300
"""Maximum length of a logged error text: it may quote what the client sent."""

Outcome = Literal["success", "error", "disconnect"]


class CompletedRequest(NamedTuple):
    """An accepted generation request. `ttft_s` is None for responses that are no stream, and without a token."""

    endpoint: str
    model: str
    stream: bool
    outcome: Outcome
    error: BaseException | None
    duration_s: float
    ttft_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


def log_completed(request: CompletedRequest) -> None:
    """Log an accepted request, however it ended."""
    level = _level(request.error)
    if not log.isEnabledFor(level):
        return
    endpoint, model, stream, outcome, error, duration_s, ttft_s, prompt, cached, output = request
    status = None if outcome == "disconnect" else 200
    if error is not None and ttft_s is None:  # later errors are sent in the stream, after the headers
        status = status_of(error)
    fields = {
        "endpoint": endpoint,
        "model": model,
        "stream": stream,
        "outcome": outcome,
        "status": status,
        "duration_s": round(duration_s, 6),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "output_tokens": output,
    }
    text = f"{endpoint} {model}{' stream' if stream else ''}: {status or outcome} in {duration_s:.3f} s"
    if ttft_s is not None:
        fields["ttft_s"] = round(ttft_s, 6)
        text += f", first token after {ttft_s:.3f} s"
    text += f", tokens {prompt} in ({cached} cached), {output} out"
    if error is not None:
        fields["error"] = shown = _shown(error)
        text += f": {shown}"
    log.log(level, text, extra=fields, exc_info=_bug(error))


def log_rejected(
    what: str, error: BaseException, duration_s: float = 0.0, *, status: int | None = None, level: int | None = None
) -> None:
    """Log a request that failed before it was accepted.

    `what` is its endpoint, or its method and path. `status` and `level` default to those of the error.
    """
    level = _level(error) if level is None else level
    if not log.isEnabledFor(level):
        return
    status = status or status_of(error)
    what = what[:ERROR_CHARS]
    shown = _shown(error)
    fields = {
        "endpoint": what,
        "outcome": "error",
        "status": status,
        "duration_s": round(duration_s, 6),
        "error": shown,
    }
    log.log(level, f"{what}: {status} in {duration_s:.3f} s: {shown}", extra=fields, exc_info=_bug(error))


def log_stream_error(what: str, error: BaseException) -> None:
    """Log an error that ended a stream after its headers had been sent; the client gets it in the stream."""
    log.log(_level(error), "%s: stream failed: %s", what, _shown(error), exc_info=_bug(error))


def log_disconnected(endpoint: str, duration_s: float) -> None:
    """Log a client that disconnected before its request was complete."""
    fields = {"endpoint": endpoint, "outcome": "disconnect", "duration_s": round(duration_s, 6)}
    log.info(
        "%s: client disconnected after %.3f s, before the request was complete", endpoint, duration_s, extra=fields
    )


def _shown(error: BaseException) -> str:
    if isinstance(error, DynamoError):
        text = error.message
    elif isinstance(error, HTTPException):
        text = str(error.detail)
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    notes = " ".join(getattr(error, "__notes__", ()))  # "raised in VllmWorker:1 generate"
    text = shorten(text, ERROR_CHARS)
    return f"{text} ({notes})" if notes else text


def _level(error: BaseException | None) -> int:
    if error is None or (is_expected(error) and status_of(error) < 500):
        return logging.INFO
    return logging.WARNING if is_expected(error) else logging.ERROR


def _bug(error: BaseException | None) -> BaseException | None:
    """Return the exception if its traceback is to be logged: a bug that no other process has logged."""
    if error is None or is_expected(error) or raised_in_another_process(error):
        return None
    return error

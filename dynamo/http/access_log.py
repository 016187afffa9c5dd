"""The line of the log about a request, when it has ended.

    chat_completions dynamo-tiny stream: 200 in 0.061 s, first token after 0.021 s, tokens 10 in (0 cached), 8 out
    chat_completions dynamo-tiny: 503 in 0.002 s: no instance of dynamo.VllmWorker.generate is available
    GET /v1/model: 404 in 0.000 s: Unknown request URL: GET /v1/model. See /docs.

At info; at warning where the server is at fault, and at error, with its traceback, where a bug is. So
`DYN_LOG=dynamo.http.access_log=warning` leaves out what went well. Unknown URLs are at debug, of which scanners try
thousands. Nothing of prompts and answers is in it.
"""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple

from dynamo.errors import DynamoError
from dynamo.http.errors import status_of
from dynamo.text import shorten

log = logging.getLogger(__name__)

ERROR_CHARS = 300
"""shown of an error's text at most: it may quote what the client sent"""

Outcome = Literal["success", "error", "disconnect"]


class CompletedRequest(NamedTuple):
    """A request for tokens that was accepted. `ttft_s` None: it was no stream, or had no token."""

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
    level = _level(request.error)
    if not log.isEnabledFor(level):
        return
    endpoint, model, stream, outcome, error, duration_s, ttft_s, prompt, cached, output = request
    status = None if outcome == "disconnect" else 200
    if error is not None and ttft_s is None:  # else it came in-band, after the headers
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
    """A request that came to nothing, `what` being its endpoint, or its method and path. `status`, `level` None: the
    error's own."""
    level = _level(error) if level is None else level
    if not log.isEnabledFor(level):
        return
    status, what, shown = status or status_of(error), what[:ERROR_CHARS], _shown(error)
    fields = {
        "endpoint": what,
        "outcome": "error",
        "status": status,
        "duration_s": round(duration_s, 6),
        "error": shown,
    }
    log.log(level, f"{what}: {status} in {duration_s:.3f} s: {shown}", extra=fields, exc_info=_bug(error))


def log_disconnected(endpoint: str, duration_s: float) -> None:
    """The client has gone before its request was complete."""
    fields = {"endpoint": endpoint, "outcome": "disconnect", "duration_s": round(duration_s, 6)}
    log.info("%s: disconnect in %.3f s, before the whole request was here", endpoint, duration_s, extra=fields)


def _shown(error: BaseException) -> str:
    text = error.message if isinstance(error, DynamoError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    notes = " ".join(getattr(error, "__notes__", ()))  # "raised in VllmWorker:1 generate"
    text = shorten(text, ERROR_CHARS)
    return f"{text} ({notes})" if notes else text


def _level(error: BaseException | None) -> int:
    if error is None or (isinstance(error, DynamoError) and error.status < 500):
        return logging.INFO
    return logging.WARNING if isinstance(error, DynamoError) else logging.ERROR


def _bug(error: BaseException | None) -> BaseException | None:
    return None if isinstance(error, DynamoError) else error

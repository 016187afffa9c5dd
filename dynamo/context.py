"""Request context: the id and the deadline that accompany a request across every process."""

from __future__ import annotations

import time
from contextvars import ContextVar

from dynamo.errors import DeadlineError

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the current request; empty outside of one."""

deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""`time.monotonic()` at which the current request expires; None: no limit."""


def after(seconds: float) -> float:
    """Return the deadline `seconds` from now."""
    return time.monotonic() + seconds


def time_left_s() -> float | None:
    """Return the seconds until the current request's deadline; None without one. Raises DeadlineError once it has passed."""
    end = deadline.get()
    if end is None:
        return None
    left = end - time.monotonic()
    if left <= 0:
        raise DeadlineError("the request's deadline has passed")
    return left

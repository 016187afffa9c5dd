"""Shortening of long text for error messages and log lines."""

from __future__ import annotations


def shorten(text: str, limit: int) -> str:
    """Return `text`, or its beginning and `...` if it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shorten_middle(text: str, limit: int) -> str:
    """Return `text`, or `limit` characters of its beginning and end: the last lines of a traceback matter most."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {text[-half:]}"

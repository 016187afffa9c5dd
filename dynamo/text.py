"""Text for error messages and log lines: shortened, compared, or read as JSON."""

from __future__ import annotations

import json
from typing import Any


def shorten(text: str, limit: int) -> str:
    """Return `text`, or its beginning and `...` if it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shorten_middle(text: str, limit: int) -> str:
    """Return `text`, or `limit` characters of its beginning and end: the last lines of a traceback matter most."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {text[-half:]}"


def edit_distance(a: str, b: str) -> int:
    """Return how many letters must be inserted, deleted, replaced or swapped with their neighbour to make `a` into `b`."""
    before: list[int] = []
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, above = above, row
    return above[-1]


def from_json(value: Any) -> Any:
    """Return the value of a JSON text; anything else, text that is no JSON included, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value

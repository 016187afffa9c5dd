"""Durations and counts as text, for the console and the CLI."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Format how long something took: `8.2 s`, `12 s`, `3 min 5 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes >= 2 else f"{round(seconds)} s"


def age(seconds: float) -> str:
    """Format how long something has existed, with two units at most: `8 s`, `3 min`, `2 h 5 min`, `4 d 2 h`."""
    minutes, hours, days = int(seconds / 60), int(seconds / 3600), int(seconds / 86400)
    if minutes < 1:
        return f"{max(seconds, 0):.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


def processes(count: int) -> str:
    """Format a number of processes: `1 process`, `3 processes`."""
    return f"{count} process{'es' if count != 1 else ''}"

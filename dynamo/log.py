"""Logging for every process of a graph: one `configure()`, text or JSON lines on standard error.

    2026-01-31T12:00:00.123Z  INFO dynamo.runtime.server: [VllmWorker:1 req-4f1c] finished in 0.21 s

`DYN_LOG` sets levels (`debug`, or `info,dynamo.runtime=debug`); `DYN_LOGGING_JSONL=true` writes JSON lines.
The request id comes from `request_id`, a context variable that the runtime sets around every endpoint call.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="")

LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "off": logging.CRITICAL + 10,
}
_QUIET = {"nats": logging.CRITICAL, "asyncio": logging.ERROR, "uvicorn": logging.WARNING, "httpx": logging.WARNING}


def parse_levels(text: str) -> tuple[int, dict[str, int]]:
    """`"info,nats=debug"` -> the root level and the level of each named logger; an unknown level is a ValueError."""
    root, named = logging.INFO, dict(_QUIET)
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, eq, level = part.rpartition("=")
        if level.lower() not in LEVELS:
            raise ValueError(f"DYN_LOG: unknown level {level!r}; levels are {', '.join(LEVELS)}")
        if eq:
            named[name] = LEVELS[level.lower()]
        else:
            root = LEVELS[level.lower()]
    return root, named


class _Formatter(logging.Formatter):
    def __init__(self, source: str, jsonl: bool) -> None:
        super().__init__()
        self.source, self.jsonl = source, jsonl

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        text, rid = record.getMessage(), request_id.get()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.jsonl:
            fields = {"time": when, "level": record.levelname, "target": record.name, "service": self.source,
                      "message": text, "file": record.filename, "line": record.lineno}  # fmt: skip
            if rid:
                fields["request_id"] = rid
            if trace:
                fields["exception"] = trace
            return json.dumps(fields)
        where = " ".join(filter(None, (self.source, rid)))
        head = f"{when} {record.levelname:>5} {record.name}: {f'[{where}] ' if where else ''}"
        return head + text + (f"\n{trace}" if trace else "")


def configure(source: str = "") -> None:
    """Send all logging of this process to standard error; `source` is `Service:worker`, put on every line."""
    try:
        root, named = parse_levels(os.environ.get("DYN_LOG", "info"))
    except ValueError as error:
        raise SystemExit(f"{error}\nhint: unset DYN_LOG or set it to info") from None
    handler = logging.StreamHandler(sys.stderr)
    jsonl = os.environ.get("DYN_LOGGING_JSONL", "").lower() in ("1", "true", "yes")
    handler.setFormatter(_Formatter(source, jsonl))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(root)
    for name, level in named.items():
        logging.getLogger(name).setLevel(level)

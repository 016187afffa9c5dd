"""Logging for every process of a graph: one `configure()`, text or JSON lines on standard error.

    2026-01-31T12:00:00.123Z  INFO dynamo.http.access_log: [Frontend req-4f1c] dynamo-tiny chat_completions: 200 in 0.21 s

`DYN_LOG` sets levels (`debug`, or `info,dynamo.http.access_log=warning`). `DYN_LOGGING_JSONL=true` writes JSON lines with
ai-dynamo's field names: time, level, target, message, file, line. Added to these are service, request_id, exception, and
the fields that a call passes as `extra`. `DYN_LOG_USE_LOCAL_TZ=true` shows times in the host's time zone instead of UTC.

The request id comes from `request_id`, a context variable that the runtime sets around every endpoint call.

A record is one line of JSON. In text it is one line, with further lines indented. Clients choose parts of messages (model
names, request ids), so control characters are escaped in text: no message can pass itself off as another record.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from typing import Any

import msgspec

from dynamo.context import request_id
from dynamo.environment import parse_bool
from dynamo.text import shorten_middle

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
_QUIET = {
    "asyncio": logging.ERROR,
    "grpc": logging.WARNING,
    "httpcore": logging.WARNING,
    "httpx": logging.WARNING,
    "nats": logging.CRITICAL,
    "uvicorn": logging.WARNING,
}
LINE_CHARS = 60_000
"""In a longer line of JSON every text is shortened to CUT_CHARS: the supervisor reads lines of 64 KiB."""
CUT_CHARS = 2_000
_SOURCE = "DYNAMO_LOG_SOURCE"
_NOT_FIELDS = {*logging.makeLogRecord({}).__dict__, "asctime", "color_message", "message", "taskName"}
"""attributes that logging and uvicorn set on a record; all others come from the caller's `extra`"""

_encode_fast = msgspec.json.Encoder(enc_hook=repr).encode
_encode = json.JSONEncoder(default=repr, allow_nan=False).encode


def parse_levels(text: str) -> tuple[int, dict[str, int]]:
    """Parse `info,nats=debug` into the root level and the level of each named logger.

    Raises ValueError for an unknown level.
    """
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


def _is_on(variable: str) -> bool:
    """Return whether a variable is set to true; anything unclear is off, since logging must not stop a process."""
    return parse_bool(os.environ.get(variable, "")) is True


def jsonl() -> bool:
    """Return whether standard error takes JSON lines (DYN_LOGGING_JSONL)."""
    return _is_on("DYN_LOGGING_JSONL")


class _Clock:
    """Times as ISO 8601 text; the text of a second is cached."""

    def __init__(self) -> None:
        self._local = _is_on("DYN_LOG_USE_LOCAL_TZ")
        self._second = 0
        self._head = ""
        self._zone = ""

    def show(self, at_s: float) -> str:
        """Format a Unix time in seconds, with milliseconds."""
        second = int(at_s)
        if second != self._second:
            parts = time.localtime(second) if self._local else time.gmtime(second)
            offset = time.strftime("%z", parts)
            self._zone = f"{offset[:3]}:{offset[3:]}" if self._local else "Z"
            self._head = time.strftime("%Y-%m-%dT%H:%M:%S", parts)
            self._second = second
        return f"{self._head}.{int((at_s - second) * 1000):03d}{self._zone}"


def dump(fields: dict[str, Any]) -> str:
    """Encode fields as one line of ASCII JSON. Never raises, whatever the values are."""
    try:
        line = _encode_fast(fields).decode()
        if not line.isascii():  # may hold control sequences for a terminal, or line separators for a reader
            line = _encode(fields)
    except Exception:  # a key or number that JSON lacks, a reference cycle, a __repr__ that raises
        line = _encode({str(name): _simple(value) for name, value in fields.items()})
    if len(line) > LINE_CHARS:
        line = _encode({str(name): _shortened(_simple(value)) for name, value in fields.items()})
    return line


def _simple(value: Any) -> str | int:
    if isinstance(value, (str, int)):
        return value
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__} in its repr>"


def _shortened(value: str | int) -> str | int:
    return value if isinstance(value, int) else shorten_middle(value, CUT_CHARS)


def _plain(text: str) -> str:
    """Indent all lines but the first, and escape control characters."""
    if text.isprintable():
        return text
    return "\n    ".join(line if line.isprintable() else _escaped(line) for line in text.split("\n"))


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)


class Formatter(logging.Formatter):
    """A record as a line of text or of JSON.

    `source` is `Service:worker`, put on every line. `as_json` None: as the environment says.
    """

    def __init__(self, source: str = "", *, as_json: bool | None = None) -> None:
        super().__init__()
        self.source = source
        self.as_json = jsonl() if as_json is None else as_json
        self._clock = _Clock()

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON or text, with its traceback and stack."""
        rid = request_id.get()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if record.stack_info:
            trace += ("\n" if trace else "") + record.stack_info
        if self.as_json:
            return self._json(record, rid, trace)
        head = f"{self._clock.show(record.created)} {record.levelname:>5} {record.name}:"
        origin = " ".join(filter(None, (self.source, rid)))
        text = f"{head} [{origin}] {_message(record)}" if origin else f"{head} {_message(record)}"
        return _plain(f"{text}\n{trace}" if trace else text)

    def _json(self, record: logging.LogRecord, rid: str, trace: str) -> str:
        fields = self.begin(record.levelname, record.name, self.source, _message(record), record.created)
        if rid:
            fields["request_id"] = rid
        for name, value in record.__dict__.items():
            if name not in _NOT_FIELDS:
                fields.setdefault(name, value)
        fields["file"] = record.filename
        fields["line"] = record.lineno
        if trace:
            fields["exception"] = trace
        return dump(fields)

    def begin(self, level: str, target: str, source: str, message: str, at_s: float | None = None) -> dict[str, Any]:
        """Return the fields that every line of JSON begins with. `at_s` is Unix time; None: now."""
        when = self._clock.show(time.time() if at_s is None else at_s)
        return {"time": when, "level": level, "target": target, "service": source, "message": message}


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # the arguments do not fit the format: log both as they are
        return f"{record.msg!s} (arguments {_simple(record.args)}: {error})"


class _StandardError(logging.Handler):
    """Writes records to file descriptor 2.

    One write per record keeps the lines of processes that share the descriptor apart. `sys.stderr` is bypassed because
    vLLM prefixes the lines written to it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; no-op if standard error is closed."""
        data = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            while data:
                data = data[os.write(2, data) :]
        except OSError:  # the terminal is closed, or the reader of the pipe has exited
            pass


def handler() -> logging.Handler:
    """Return a handler like the one that `configure` installed, and set the levels of loggers.

    Processes that an engine spawns call it and inherit the source of the process above them:
    `engines/vllm/logging.json` names it for those of vLLM.
    """
    root, named = parse_levels(os.environ.get("DYN_LOG", "info"))
    engine_level = LEVELS.get(os.environ.get("VLLM_LOGGING_LEVEL", "").lower())
    if engine_level is not None:
        named.setdefault("vllm", engine_level)
    logging.root.setLevel(root)
    for name, level in named.items():
        logging.getLogger(name).setLevel(level)
    to_stderr = _StandardError()
    to_stderr.setFormatter(Formatter(os.environ.get(_SOURCE, "")))
    return to_stderr


def configure(source: str = "") -> None:
    """Send all logging of this process to standard error; `source` is `Service:worker`, put on every line.

    With JSON lines, warnings and unhandled exceptions are logged too. Raises SystemExit, with an error and a hint on
    standard error, if DYN_LOG is wrong.
    """
    os.environ[_SOURCE] = source
    try:
        logging.root.handlers[:] = [handler()]
    except ValueError as error:
        hint = "unset DYN_LOG or set it to info"
        if not jsonl():
            raise SystemExit(f"error: {error}\nhint: {hint}") from None
        line = Formatter().begin("ERROR", __name__, source, str(error))
        print(dump({**line, "hint": hint}), file=sys.stderr)
        raise SystemExit(1) from None
    if jsonl():
        logging.captureWarnings(True)
        sys.excepthook = lambda _, error, __: _unhandled(error)
        sys.unraisablehook = lambda found: _unhandled(found.exc_value)
        threading.excepthook = lambda found: _unhandled(found.exc_value)


def _unhandled(error: BaseException | None) -> None:
    if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        logging.getLogger(__name__).critical("not handled: %r", error, exc_info=error)

"""Logging for every process of a graph: one `configure()`, text or JSON lines on standard error.

    2026-01-31T12:00:00.123Z  INFO dynamo.http.access_log: [Frontend req-4f1c] dynamo-tiny chat_completions: 200 in 0.21 s

`DYN_LOG` sets levels (`debug`, or `info,dynamo.http.access_log=warning`). `DYN_LOGGING_JSONL=true` writes JSON lines, with
ai-dynamo's names: time, level, target, message, file, line; and service, request_id, exception, and what the call gave as
`extra`. `DYN_LOG_USE_LOCAL_TZ=true` shows times with the host's offset instead of UTC.

The request id comes from `request_id`, a context variable that the runtime sets around every endpoint call.

A record is one line of JSON, or in text one line with its further ones indented. Clients choose parts of messages (names
of models, request ids): in text, control characters are escaped, so that no message looks like another line.
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
"""A longer line of JSON has its texts cut: the supervisor reads lines of 64 KiB."""
CUT_CHARS = 2_000
_SOURCE = "DYNAMO_LOG_SOURCE"
_NOT_FIELDS = {*logging.makeLogRecord({}).__dict__, "asctime", "color_message", "message", "taskName"}
"""attributes that logging itself and uvicorn give to a record; others are the caller's `extra`"""

_encode_fast = msgspec.json.Encoder(enc_hook=repr).encode
_encode = json.JSONEncoder(default=repr, allow_nan=False).encode


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


def _true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def jsonl() -> bool:
    """Whether standard error is to have JSON lines."""
    return _true("DYN_LOGGING_JSONL")


class _Clock:
    """Times as text; that of a second is made once."""

    def __init__(self) -> None:
        self._local = _true("DYN_LOG_USE_LOCAL_TZ")
        self._second, self._head, self._zone = 0, "", ""

    def show(self, at_s: float) -> str:
        """`at_s`: Unix time in seconds."""
        second = int(at_s)
        if second != self._second:
            parts = time.localtime(second) if self._local else time.gmtime(second)
            offset = time.strftime("%z", parts)
            self._zone = f"{offset[:3]}:{offset[3:]}" if self._local else "Z"
            self._head, self._second = time.strftime("%Y-%m-%dT%H:%M:%S", parts), second
        return f"{self._head}.{int((at_s - second) * 1000):03d}{self._zone}"


def dump(fields: dict[str, Any]) -> str:
    """One line of JSON in ASCII, whatever the values are."""
    try:
        line = _encode_fast(fields).decode()
        if not line.isascii():  # which a terminal might take for control sequences, and a reader for ends of lines
            line = _encode(fields)
    except Exception:  # a key or a number that JSON has not, a loop, a __repr__ that fails
        line = _encode({str(name): _simple(value) for name, value in fields.items()})
    if len(line) > LINE_CHARS:
        line = _encode({str(name): _cut(_simple(value)) for name, value in fields.items()})
    return line


def _simple(value: Any) -> str | int:
    if isinstance(value, (str, int)):
        return value
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__} in its repr>"


def _cut(value: str | int) -> str | int:
    """Begin and end of a long text: a traceback tells most at its end."""
    if isinstance(value, int) or len(value) <= CUT_CHARS:
        return value
    half = CUT_CHARS // 2
    return f"{value[:half]} ... {value[-half:]}"


def _plain(text: str) -> str:
    """Further lines indented, control characters escaped."""
    if text.isprintable():
        return text
    return "\n    ".join(line if line.isprintable() else _escaped(line) for line in text.split("\n"))


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)


class Formatter(logging.Formatter):
    def __init__(self, source: str = "", *, as_json: bool | None = None) -> None:
        """`source`: `Service:worker`. `as_json` None: as the environment says."""
        super().__init__()
        self.source, self.as_json = source, jsonl() if as_json is None else as_json
        self._clock = _Clock()

    def format(self, record: logging.LogRecord) -> str:
        rid, trace = request_id.get(), ""
        if record.exc_info:
            trace = self.formatException(record.exc_info)
        if record.stack_info:
            trace += ("\n" if trace else "") + record.stack_info
        if self.as_json:
            return self._json(record, rid, trace)
        where = " ".join(filter(None, (self.source, rid)))
        head = f"{self._clock.show(record.created)} {record.levelname:>5} {record.name}: "
        return _plain(f"{head}{f'[{where}] ' if where else ''}{_message(record)}{trace and f'{chr(10)}{trace}'}")

    def _json(self, record: logging.LogRecord, rid: str, trace: str) -> str:
        fields = self.begin(record.levelname, record.name, self.source, _message(record), record.created)
        if rid:
            fields["request_id"] = rid
        for name, value in record.__dict__.items():
            if name not in _NOT_FIELDS:
                fields.setdefault(name, value)
        fields["file"], fields["line"] = record.filename, record.lineno
        if trace:
            fields["exception"] = trace
        return dump(fields)

    def begin(self, level: str, target: str, source: str, message: str, at_s: float | None = None) -> dict[str, Any]:
        """What every line of JSON has. `at_s`: Unix time; None: now."""
        when = self._clock.show(time.time() if at_s is None else at_s)
        return {"time": when, "level": level, "target": target, "service": source, "message": message}


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # arguments that do not fit: say what there is
        return f"{record.msg!s} (arguments {_simple(record.args)}: {error})"


class _StandardError(logging.Handler):
    """Writes to the descriptor: a line at a time, so that those of processes that share it do not mix, and past
    `sys.stderr`, before whose lines vLLM puts a prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        data = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            while data:
                data = data[os.write(2, data) :]
        except OSError:  # the terminal was closed, or the reader of the pipe has left
            pass


def handler() -> logging.Handler:
    """A handler as `configure` gave to the root logger of this process or, in one that an engine spawned, of the
    process above it; levels are set too. `engines/vllm/logging.json` names it for the processes of vLLM."""
    root, named = parse_levels(os.environ.get("DYN_LOG", "info"))
    engine_level = LEVELS.get(os.environ.get("VLLM_LOGGING_LEVEL", "").lower())
    if engine_level is not None:
        named.setdefault("vllm", engine_level)
    logging.root.setLevel(root)
    for name, level in named.items():
        logging.getLogger(name).setLevel(level)
    made = _StandardError()
    made.setFormatter(Formatter(os.environ.get(_SOURCE, "")))
    return made


def configure(source: str = "") -> None:
    """Send all logging of this process to standard error; `source` is `Service:worker`, put on every line.

    With JSON lines also warnings, and exceptions that nobody handles. SystemExit where DYN_LOG is wrong.
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

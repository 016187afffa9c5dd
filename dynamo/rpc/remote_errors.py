"""Exceptions across processes: sent as data, raised again as the same class with a note where they were raised.

Only classes that the receiving process has already imported are used; a sender cannot cause an import.
"""

from __future__ import annotations

import builtins
import sys
from typing import Any

import msgspec

from dynamo.errors import DynamoError, RemoteError

MAX_ARGS_BYTES = 1 << 16
_PLAIN = (str, int, float, bool, bytes, type(None))
_NOTE = "raised in "


class Failure(msgspec.Struct, array_like=True):
    """An exception. `kind` is `module:qualname`; `args` are its constructor's, if they are plain data."""

    kind: str
    message: str
    hint: str | None = None
    param: str | None = None
    args: list[Any] = []
    where: str = ""
    base: str = ""
    """the class of `dynamo.errors` that it derives from, for receivers that do not have `kind`"""


def pack(error: BaseException, where: str = "") -> Failure:
    """Return an exception as data. `where` is the process and endpoint, unless the exception came from another one."""
    cls = type(error)
    kind = f"{cls.__module__}:{cls.__qualname__}"
    note = next((n for n in getattr(error, "__notes__", ()) if n.startswith(_NOTE)), "")
    where = note.removeprefix(_NOTE) or where
    message = _text(error)
    if isinstance(error, DynamoError):
        base = next(c.__qualname__ for c in cls.__mro__ if c.__module__ == DynamoError.__module__)
        hint, param = (None if v is None else _sendable(str(v)) for v in (error.hint, error.param))
        return Failure(kind, message, hint, param, where=where, base=base)
    return Failure(kind, message or cls.__name__, args=_arguments(error, message), where=where)


def _text(error: BaseException) -> str:
    try:
        return _sendable(str(error.message if isinstance(error, DynamoError) else error))
    except Exception:  # a broken __str__ must not hide the failure itself
        return type(error).__name__


def _sendable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()  # an unpaired surrogate has no UTF-8


def _arguments(error: BaseException, message: str) -> list[Any]:
    """Return the constructor's arguments as pickle would pass them: `error.args` lacks OSError's file name."""
    try:
        reduced = error.__reduce__()
        arguments = list(reduced[1]) if isinstance(reduced, tuple) and reduced[0] is type(error) else [message]
        arguments = [_sendable(a) if isinstance(a, str) else a for a in arguments]
        if all(type(a) in _PLAIN for a in arguments) and len(msgspec.msgpack.encode(arguments)) <= MAX_ARGS_BYTES:
            return arguments
    except Exception:
        pass
    return [message]


def _find(kind: str) -> type[Exception] | None:
    module, _, name = kind.partition(":")
    found: Any = builtins if module == "builtins" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def unpack(failure: Failure) -> Exception:
    """Return the exception, as its own class if that is known here, else its class of `dynamo.errors` or RemoteError."""
    error = _build(_find(failure.kind), failure)
    if error is None and failure.base:
        error = _build(_find(f"{DynamoError.__module__}:{failure.base}"), failure)
    if error is None:
        error = RemoteError(f"{failure.kind.partition(':')[2]}: {failure.message}", hint=failure.hint)
    if failure.where:
        error.add_note(f"{_NOTE}{failure.where}")
    return error


def raised_in_another_process(error: BaseException) -> bool:
    """Return True if the exception came through `unpack`. The process that raised it has logged it."""
    return any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ()))


def _build(cls: type[Exception] | None, failure: Failure) -> Exception | None:
    """Return None if the class is unknown or its constructor takes other arguments."""
    if cls is None:
        return None
    try:
        if issubclass(cls, DynamoError):
            error: Exception = cls(failure.message, hint=failure.hint, param=failure.param)
        else:
            error = cls(*failure.args)
    except Exception:
        return None
    return error if isinstance(error, Exception) else None

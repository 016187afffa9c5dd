"""Exceptions as data: what one process raised comes back in another as the same class, with a note where it happened.

Only classes that the receiving process has already imported are used; nothing is imported because a peer said so.
"""

from __future__ import annotations

import builtins
import sys
from typing import Any

import msgspec

from dynamo.errors import DynamoError, RemoteError

_PLAIN = (str, int, float, bool, bytes, type(None))


class Failure(msgspec.Struct, array_like=True):
    """`kind` is `module:qualname`; `args` are the exception's own arguments where they are plain data."""

    kind: str
    message: str
    hint: str | None = None
    param: str | None = None
    args: list[Any] = []
    where: str = ""


def pack(error: BaseException, where: str = "") -> Failure:
    kind = f"{type(error).__module__}:{type(error).__qualname__}"
    args = list(error.args) if all(isinstance(a, _PLAIN) for a in error.args) else [str(error)]
    note = next((n for n in getattr(error, "__notes__", ()) if n.startswith("raised in ")), "")
    where = note.removeprefix("raised in ") or where
    if isinstance(error, DynamoError):
        return Failure(kind, error.message, error.hint, error.param, args, where)
    return Failure(kind, str(error) or type(error).__name__, args=args, where=where)


def _find(kind: str) -> type[Exception] | None:
    module, _, name = kind.partition(":")
    found: Any = builtins if module == "builtins" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def unpack(failure: Failure) -> Exception:
    cls = _find(failure.kind)
    error: Exception | None = None
    if cls is not None and issubclass(cls, DynamoError):
        error = cls(failure.message, hint=failure.hint, param=failure.param)
    elif cls is not None:
        try:
            error = cls(*failure.args)
        except Exception:  # a constructor of its own shape: the message still gets through, as RemoteError
            error = None
    if error is None:
        error = RemoteError(f"{failure.kind.partition(':')[2]}: {failure.message}", hint=failure.hint)
    if failure.where:
        error.add_note(f"raised in {failure.where}")
    return error

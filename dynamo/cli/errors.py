"""Errors of the command line: one line, a hint, an exit code. Bugs keep their traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

from dynamo.errors import DynamoError
from dynamo.log import Formatter, dump, jsonl

INTERRUPTED = 130  # 128 + SIGINT, as shells expect


def in_colour(stream: TextIO) -> bool:
    """Return whether to write colours to a stream: on a terminal, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def report(error: DynamoError | click.ClickException) -> int:
    """Print `error: ...` and `hint: ...` on standard error, and return the exit code.

    With DYN_LOGGING_JSONL, print one JSON line instead.
    """
    if isinstance(error, DynamoError):
        message = error.message
        hint = error.hint
    else:
        message = error.format_message()
        hint = _usage_hint(error)
    message = " ".join(message.split("\n"))
    if jsonl():
        _write_json("ERROR", message, **({"hint": hint} if hint else {}))
        return error.exit_code
    colour = in_colour(sys.stderr)
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True, color=colour)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {hint}", err=True, color=colour)
    return error.exit_code


def warn(message: str) -> None:
    """Print `warning: ...` on standard error, or one JSON line, as `report` does."""
    if jsonl():
        _write_json("WARNING", message)
    else:
        click.echo(f"warning: {message}", err=True)


@contextmanager
def short_warnings() -> Iterator[None]:
    """Print warnings about the declarations of a graph by `warn`: without file, line and source."""
    from dynamo.sdk.arguments import IgnoredArgumentWarning  # dynamo.sdk is not needed by every command

    with warnings.catch_warnings():
        as_python = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if issubclass(category, IgnoredArgumentWarning):
                warn(str(message))
            else:
                as_python(message, category, *place, **options)

        warnings.showwarning = show
        yield


def _write_json(level: str, message: str, **fields: str) -> None:
    click.echo(dump({**Formatter("cli").begin(level, "dynamo.cli", "cli", message), **fields}), err=True)


def _usage_hint(error: click.ClickException) -> str | None:
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return None
    extra = ""
    if isinstance(error, click.NoSuchOption) and context.command.name == "serve":
        extra = "a service's setting is --Service.key=value; "
    return f"{extra}run `{context.command_path} --help`"

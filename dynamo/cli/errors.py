"""How the command line says that something is wrong: one line, a hint, an exit code. Bugs keep their traceback."""

from __future__ import annotations

import os
import sys

import click

from dynamo import log
from dynamo.errors import DynamoError

INTERRUPTED = 130  # 128 + SIGINT, what a shell expects


def report(error: DynamoError | click.ClickException) -> int:
    """Print `error: ...` and `hint: ...` on standard error; returns the exit code. Colour on a terminal only.

    One JSON line instead where standard error has JSON lines.
    """
    if isinstance(error, DynamoError):
        message, hint = error.message, error.hint
    else:
        message, hint = error.format_message(), _usage_hint(error)
    message = " ".join(message.split("\n"))
    if log.jsonl():
        _write("ERROR", message, **({"hint": hint} if hint else {}))
        return error.exit_code
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True, color=colour)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {hint}", err=True, color=colour)
    return error.exit_code


def warn(message: str) -> None:
    """Print `warning: ...` on standard error, or one JSON line, as `report` does."""
    if log.jsonl():
        _write("WARNING", message)
    else:
        click.echo(f"warning: {message}", err=True)


def _write(level: str, message: str, **fields: str) -> None:
    click.echo(log.dump({**log.Formatter("cli").begin(level, "dynamo.cli", "cli", message), **fields}), err=True)


def _usage_hint(error: click.ClickException) -> str | None:
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return None
    extra = ""
    if isinstance(error, click.NoSuchOption) and context.command.name == "serve":
        extra = "a service's setting is --Service.key=value; "
    return f"{extra}run `{context.command_path} --help`"

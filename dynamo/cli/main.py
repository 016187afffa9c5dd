"""The command `dynamo`: finds the subcommand, imports it alone, and turns errors into lines and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

import dynamo
from dynamo.cli.errors import INTERRUPTED, report
from dynamo.errors import DynamoError

COMMANDS = {
    "serve": ("dynamo.cli.serve:serve", "Start an inference graph, or show how it would start."),
}
"""Subcommand -> where it is, and its line in `dynamo --help`, which imports none of them."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dynamo.__version__, "-v", "--version", message="Dynamo CLI version: %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Serve large language models as inference graphs."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command; returns the exit code. `arguments` are those of the process unless given."""
    try:
        code = group.main(
            args=None if arguments is None else list(arguments), prog_name="dynamo", standalone_mode=False
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (DynamoError, click.ClickException) as error:
        return report(error)
    except click.Abort:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as in `dynamo serve ... --dry-run | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())

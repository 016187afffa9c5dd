"""The command `dynamo`: imports only the subcommand that is run, and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

import dynamo
from dynamo.cli.errors import INTERRUPTED, report
from dynamo.errors import DynamoError

SECTIONS = {
    "Graphs": {
        "serve": ("dynamo.cli.serve:serve", "Start an inference graph, or show how it would start."),
        "run": ("dynamo.cli.run:run", "Chat with a model in the terminal."),
        "build": ("dynamo.cli.build:build", "Pack a graph as a container image."),
        "init": ("dynamo.cli.init:init", "Create a graph project that is ready to run."),
    },
    "Running graphs": {
        "status": ("dynamo.cli.status:status", "Show running graphs: instances, models, load."),
        "set": ("dynamo.cli.set:change", "Change settings of a running graph."),
        "scale": ("dynamo.cli.scale:scale", "Add and remove workers of a running graph."),
        "llmctl": ("dynamo.cli.llmctl:llmctl", "List, add and remove models."),
    },
    "This machine": {
        "env": ("dynamo.cli.env:env", "Show versions, hardware and settings for a bug report."),
        "completion": ("dynamo.cli.completion:completion", "Print the completion script for a shell."),
    },
}
"""Section of `dynamo --help` -> subcommand -> its place, and its line in the help, so that the help imports none of them."""

COMMANDS = {name: where for commands in SECTIONS.values() for name, (where, _) in commands.items()}

_PACKED = "pack the graph as an image with `dynamo build`, and run that image"
FORMER = {
    "deploy": _PACKED,
    "deployment": _PACKED,
    "cloud": _PACKED,
    "server": _PACKED,
    "get": "list running graphs with `dynamo status`",
    "list": "list running graphs with `dynamo status`, their models with `dynamo llmctl http list`",
    "start": "start a graph with `dynamo serve`",
}
"""Command of ai-dynamo 0.1 to 0.3 that does not exist here -> what does instead."""


class FormerCommandError(DynamoError):
    """A command of ai-dynamo that does not exist here: a usage error."""

    exit_code = 2


def _former(name: str) -> click.Command:
    """Return a hidden command that takes any arguments and raises FormerCommandError."""

    def fail(arguments: tuple[str, ...]) -> None:
        raise FormerCommandError(f"ai-dynamo's command `dynamo {name}` does not exist here", hint=FORMER[name])

    return click.Command(
        name,
        callback=fail,
        params=[click.Argument(["arguments"], nargs=-1)],
        hidden=True,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in FORMER:
            return _former(cmd_name)
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()])


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dynamo.__version__, "-v", "--version", message="Dynamo CLI version: %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Serve large language models as inference graphs."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command, and return its exit code. `arguments` None: those of the process."""
    return invoke(group, "dynamo", arguments)


def invoke(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command under the program name `name`, report its errors, and return the exit code."""
    try:
        code = command.main(args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (DynamoError, click.ClickException) as error:
        return report(error)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has exited, as in `dynamo serve ... --dry-run | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""The command `dynamo` as a Typer application, for tests that run it with `typer.testing.CliRunner`."""

from __future__ import annotations

from collections.abc import Callable

import typer  # not a dependency of the project: who runs Typer's CliRunner has it

from dynamo.cli.main import COMMANDS, main

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def _command(name: str) -> Callable[[typer.Context], None]:
    def run(ctx: typer.Context) -> None:
        raise typer.Exit(main([name, *ctx.args]))

    return run


def application() -> typer.Typer:
    """Return a Typer application whose commands pass their arguments on to those of `dynamo`."""
    app = typer.Typer(name="dynamo", add_completion=False, no_args_is_help=True)
    for name in COMMANDS:
        app.command(name, add_help_option=False, context_settings=_PASSED_ON)(_command(name))
    return app

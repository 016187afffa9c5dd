"""`from dynamo.sdk.cli.cli import cli`, as tests of ai-dynamo 0.1 to 0.3 write it: a Typer application."""

try:
    from dynamo.compat.typer_app import application

    cli = application()
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    from dynamo.cli.main import group as cli  # type: ignore[assignment]  # for click.testing.CliRunner

__all__ = ["cli"]

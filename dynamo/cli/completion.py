"""`dynamo completion`: the script with which a shell completes commands, options and file names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_DYNAMO_COMPLETE"  # click derives it from the command's name when the shell calls back


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that lets SHELL (bash, zsh or fish) complete `dynamo` with the Tab key.

    \b
    Examples:
      eval "$(dynamo completion bash)"                              # for this shell; for every shell, add it to ~/.bashrc
      eval "$(dynamo completion zsh)"                               # likewise, with ~/.zshrc
      dynamo completion fish > ~/.config/fish/completions/dynamo.fish
    """
    from dynamo.cli.main import group

    found = get_completion_class(shell)
    assert found is not None  # one of SHELLS
    click.echo(found(group, {}, "dynamo", VARIABLE).source())

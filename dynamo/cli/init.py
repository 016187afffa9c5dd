"""`dynamo init`: creates a graph project from the files in `templates/`."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import click

from dynamo.errors import ConfigError, DynamoError

FILES = {
    "component.py": "component.py.txt",
    "graph.py": "graph.py.txt",
    "config.yaml": "config.yaml.txt",
    "test_graph.py": "test_graph.py.txt",
    "README.md": "README.md.txt",
    ".gitignore": "gitignore.txt",
}
"""Name in the project -> name in `templates/`; the suffix keeps tools from treating them as files of this package."""

MARK = "@NAME@"
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]{0,49}")


@click.command()
@click.argument("name")
def init(name: str) -> None:
    """Create a graph project in a new directory NAME: a chat service, an HTTP frontend, and their tests.

    NAME is also the name of its model and the namespace of its services.

    \b
    Example:
      dynamo init parrot && cd parrot
      dynamo serve graph:Frontend -f config.yaml
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a project",
            hint="use letters, digits, _ and -, beginning with a letter, at most 50",
        )
    directory = Path(name)
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ConfigError(f"{name} exists, and nothing is overwritten", hint="choose another name, or remove it")
        directory.mkdir(exist_ok=True)
        for file, text in project(name).items():
            with (directory / file).open("x", encoding="utf-8") as new:
                new.write(text)
    except OSError as error:
        raise DynamoError(f"cannot write {error.filename or name}: {error.strerror}") from None
    click.echo(f"created {name}: {', '.join(FILES)}")
    click.echo(f"next: cd {name} && dynamo serve graph:Frontend -f config.yaml")


def project(name: str) -> dict[str, str]:
    """Return the texts of a project's files by file name."""
    templates = resources.files("dynamo.cli") / "templates"
    return {file: (templates / source).read_text("utf-8").replace(MARK, name) for file, source in FILES.items()}

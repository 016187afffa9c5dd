"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

PORT = click.IntRange(0, 65535)
PORT.name = "port"  # as error messages call it
FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
WORKING_DIR = click.option(
    "--working-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Directory that GRAPH is imported from, and that its services run in; the current directory by default.",
)

"""Tables as text, laid out by rich.

Values are never wrapped or truncated, and coloured only on request: what a pipe gets suits grep and awk.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

UNLIMITED_WIDTH = 1_000_000


def render(
    rows: Sequence[Sequence[str]],
    head: Sequence[str] = (),
    *,
    boxed: bool = False,
    indent: int = 0,
    colour: bool = False,
) -> str:
    """Return rows, and a head if there is one, as lines of columns two blanks apart, without a final line end.

    `boxed` draws ASCII lines around the cells; `indent` is in characters; `colour` makes the head bold.
    """
    from rich import box  # imported only when a table is printed: it takes 50 ms
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.ASCII2 if boxed else None,
        padding=(0, 1) if boxed else (0, 2, 0, 0),
        pad_edge=boxed,
        show_header=bool(head),
        header_style="bold",
    )
    for name in head or [""] * max(map(len, rows), default=0):
        table.add_column(Text(name), no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(
        file=io.StringIO(),
        width=UNLIMITED_WIDTH,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
    )
    with console.capture() as captured:
        console.print(Padding(table, (0, 0, 0, indent), expand=False))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())

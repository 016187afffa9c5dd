"""Tables as text: columns, boxes, and values that stay whole."""

from __future__ import annotations

from dynamo.cli.tables import render

HEAD = ("NAME", "VALUE")
ROWS = [("a", "[bold]1[/bold]"), ("longer", "")]


def test_columns_are_two_blanks_apart_and_lines_end_without_blanks():
    assert render(ROWS, HEAD).splitlines() == ["NAME    VALUE", "a       [bold]1[/bold]", "longer"]
    assert render(ROWS, indent=2).splitlines() == ["  a       [bold]1[/bold]", "  longer"]
    assert render([]) == ""


def test_a_box_of_ascii_lines():
    assert render([("a", "1")], HEAD, boxed=True).splitlines() == [
        "+------+-------+",
        "| NAME | VALUE |",
        "+------+-------+",
        "| a    | 1     |",
        "+------+-------+",
    ]


def test_long_values_are_neither_wrapped_nor_truncated():
    value = "word " * 1000 + "end"
    assert render([("a", value)]) == f"a  {value}"


def test_only_the_head_is_coloured():
    first, *rest = render(ROWS, HEAD, colour=True).splitlines()
    assert "\x1b[1m" in first
    assert not any("\x1b" in line for line in rest)

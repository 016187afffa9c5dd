"""ARCHITECTURE.md names what exists: every `module:name`, every path, and every room with its floor."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

from tests.unit.test_floors import FLOORS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
NAMES = sorted(set(re.findall(r"`((?:dynamo|components)[\w.]*:[\w.]+)`", TEXT)))
PATHS = sorted(set(re.findall(r"`((?:dynamo|components|graphs|configs|benchmarks|tests)/[\w/.]*)`", TEXT)))


def test_there_are_names() -> None:
    assert len(NAMES) > 40
    assert len(PATHS) > 20


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_defined_where_the_page_says(name: str) -> None:
    found = pkgutil.resolve_name(name)
    assert found.__module__ == name.partition(":")[0]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_table_of_rooms_is_that_of_the_floors() -> None:
    rows = re.findall(r"^\| (\d) \| `dynamo/(\w+)`", TEXT, re.MULTILINE)
    shown = {room: int(floor) for floor, room in rows if room not in ("runtime",)}
    expected = {
        room: floor
        for floor, rooms in enumerate(FLOORS)
        for room in rooms
        if (ROOT / "dynamo" / room).is_dir() and room not in ("runtime",)
    }
    assert shown == expected

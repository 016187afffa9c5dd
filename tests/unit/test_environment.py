"""Booleans in environment variables, and text cut to a length."""

from __future__ import annotations

import pytest

from dynamo.environment import enabled, parse_bool
from dynamo.errors import ConfigError
from dynamo.text import shorten, shorten_middle


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), (" Yes ", True), ("1", True), ("ON", True), ("no", False), ("0", False), ("", None), ("2", None)],
)
def test_parse_bool(text: str, value: bool | None) -> None:
    assert parse_bool(text) is value


def test_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_X", raising=False)
    assert not enabled("DYN_X")
    monkeypatch.setenv("DYN_X", "on")
    assert enabled("DYN_X")
    monkeypatch.setenv("DYN_X", "maybe")
    with pytest.raises(ConfigError, match="DYN_X: expected a yes or a no, found 'maybe'"):
        enabled("DYN_X")


def test_shorten() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abc..."
    assert shorten_middle("abcdef", 6) == "abcdef"
    assert shorten_middle("abcdefghij", 4) == "ab ... ij"

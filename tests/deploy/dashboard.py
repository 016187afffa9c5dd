"""Grafana's dashboards, read as Grafana reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.deploy.container import DEPLOY

FILES = sorted((DEPLOY / "metrics/grafana/dashboards").glob("*.json"))
RATE_INTERVAL = "20s"
"""$__rate_interval as Grafana reckons it: four scrapes"""
NOW = ("stat", "gauge")
"""kinds of panels with one value"""


class Query(NamedTuple):
    place: str
    """Dashboard and panel or variable, for messages."""
    expression: str
    """PromQL without variables."""
    legend: frozenset[str] = frozenset()
    """The labels of the samples that its legend or its variable uses."""

    @property
    def names(self) -> set[str]:
        """The metrics in it."""
        grouping = r"(?:\w+ (?:by|without)|on|group_left) \([^)]*\)"
        text = re.sub(rf"{grouping}|\"[^\"]*\"|\{{[^}}]*\}}|\[[^]]*\]", " ", self.expression)
        words = re.findall(r"(?<![\w.])[A-Za-z_:][\w:]*(?![\w:(])", text)
        return set(words) - {"or", "and", "unless"}


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return all panels except rows, including those of collapsed rows."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def variables(board: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the variables filled by a query, by name."""
    return {found["name"]: found for found in board["templating"]["list"] if found["type"] == "query"}


def queries(file: Path, choice: Mapping[str, str] | None = None, kinds: tuple[str, ...] = ()) -> Iterator[Query]:
    """Return Grafana's queries for a dashboard, with `All` selected in each variable without a `choice`.

    With `kinds`, for the panels of these kinds alone.
    """
    board = json.loads(file.read_text())
    chosen = {name: found["allValue"] for name, found in variables(board).items()} | dict(choice or {})
    chosen |= {"__rate_interval": RATE_INTERVAL, "__range": "10m"}

    def fill(expression: str) -> str:
        return re.sub(r"\$(\w+)", lambda name: chosen[name[1]], expression)

    for panel in panels(board):
        if kinds and panel["type"] not in kinds:
            continue
        for target in panel["targets"]:
            legend = frozenset(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            yield Query(f"{file.stem}: {panel['title']}", fill(target["expr"]), legend)
    for name, found in () if kinds else variables(board).items():
        asked = re.fullmatch(r"label_values\((.*), (\w+)\)", found["query"]["query"])
        assert asked, found["query"]
        yield Query(f"{file.stem}: ${name}", fill(f"count by ({asked[2]}) ({asked[1]})"), frozenset({asked[2]}))

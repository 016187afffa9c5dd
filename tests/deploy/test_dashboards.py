"""The dashboards: valid for Grafana, and of metrics that exist."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.conftest import BusyGraph
from tests.deploy.dashboard import FILES, NOW, Query, panels, queries, variables

# Not of our processes: metrics of the exporters, of etcd, and Prometheus' own about a scrape.
OTHERS = ("DCGM_", "gnatsd_", "etcd_", "up")
# Empty if a graph has no such part, or if there was no fault.
OPTIONAL = re.compile("dynamo_(router|disagg|prefill)_|dynamo_migrations|DCGM|gnatsd|restarts")
BOARD = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(file.read_text())
    return board


def test_there_are_two_with_unique_ids() -> None:
    boards = [read(file) for file in FILES]
    assert [board["title"] for board in boards] == ["KV cache and routing", "Serving"]
    assert len({board["uid"] for board in boards}) == len(boards)
    for board in boards:
        assert board["id"] is None  # Grafana gives its own; another's would replace a dashboard there
        assert board["refresh"] == "5s"
        assert board["schemaVersion"] >= 41


@BOARD
def test_files_are_formatted_for_diffs(file: Path) -> None:
    assert file.read_text() == json.dumps(read(file), indent=2, ensure_ascii=False) + "\n"


@BOARD
def test_panels_have_unique_ids_and_places(file: Path) -> None:
    board = read(file)
    rows = [panel for panel in board["panels"] if panel["type"] == "row"]
    ids = [panel["id"] for panel in [*rows, *panels(board)]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in [*rows, *panels(board)]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


@BOARD
def test_panels_are_described(file: Path) -> None:
    board = read(file)
    titles = [panel["title"] for panel in panels(board) if panel["type"] == "timeseries"]
    assert len(set(titles)) == len(titles)
    for panel in panels(board):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["legendFormat"], panel["title"]
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        if any(OPTIONAL.search(target["expr"]) for target in panel["targets"]):
            assert panel["fieldConfig"]["defaults"].get("noValue"), f"{panel['title']} does not say what would fill it"


@BOARD
def test_single_values_are_instant_queries(file: Path) -> None:
    """The last value of a time range would still be shown long after its process has ended."""
    found = [panel for panel in panels(read(file)) if panel["type"] in NOW]
    assert len(found) >= 7
    for panel in found:
        assert panel["fieldConfig"]["defaults"]["noValue"], panel["title"]
        for target in panel["targets"]:
            assert target["instant"] is True, panel["title"]
            assert "range" not in target, panel["title"]
            assert "$__rate_interval" not in target["expr"], f"{panel['title']}: it grows with the time range shown"


@BOARD
def test_counters_are_shown_as_rates(file: Path) -> None:
    """The total since the start is unrelated to the time range, and falls when a process restarts."""
    for panel in panels(read(file)):
        for target in panel["targets"]:
            for counter in re.finditer(r"\w+_total\b(?:\{[^}]*\})?(\[)?", target["expr"]):
                assert counter[1] or counter[0].startswith("llm_kv_blocks_total"), target["expr"]


@BOARD
def test_every_metric_of_a_graph_is_of_the_chosen_namespace(file: Path) -> None:
    board = read(file)
    asked = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    asked += [found["query"]["query"] for name, found in variables(board).items() if name != "namespace"]
    found = [one for text in asked for one in re.finditer(r"\b(?:dynamo|llm|process)_\w+(\{[^}]*\})?", text)]
    assert len(found) > 30
    assert [one[0] for one in found if 'namespace=~"$namespace"' not in (one[1] or "")] == []


@BOARD
def test_variables_are_declared_and_used(file: Path) -> None:
    board = read(file)
    declared = {found["name"] for found in board["templating"]["list"]}
    asked = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    asked += [found["query"]["query"] for found in variables(board).values()]
    used = set(re.findall(r"\$(?!__)(\w+)", " ".join(asked)))
    assert used | {"datasource"} == declared
    assert all(re.search(rf'=~"\${name}"', " ".join(asked)) for name in used)  # several can be chosen


@BOARD
def test_process_metrics_are_of_our_job(file: Path) -> None:
    """Prometheus, etcd and the exporters export process_* too."""
    for query in queries(file):
        for selector in re.findall(r"process_(?:cpu|resident|open|start)\w*(\{[^}]*\})?", query.expression):
            assert 'job="dynamo"' in selector, query


def test_the_names_in_a_query_are_found() -> None:
    """The test below relies on it."""
    asked = 'sum by (le, x) (rate(a_bucket{b="c"}[5m])) / clamp_min(sum(d_total), 1e-9) or vector(0)'
    assert Query("", asked).names == {"a_bucket", "d_total"}


@BOARD
def test_every_metric_is_exported_by_a_graph(file: Path, busy_graph: BusyGraph) -> None:
    text = httpx.get(f"http://{busy_graph.metrics}/metrics", timeout=30).raise_for_status().text
    shown = set(re.findall(r"^([A-Za-z_:][\w:]*)[{ ]", text, re.MULTILINE))
    asked = set().union(*(query.names for query in queries(file)))
    assert len(asked) > 10
    assert {name for name in asked if not name.startswith(OTHERS)} - shown == set()

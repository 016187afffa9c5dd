"""How `pytest -n` divides the tests: files stay together, files that share a graph or an engine too, the longest first.

The graphs and servers that tests share are fixtures, so each xdist worker has its own: a group runs on one worker.
(Not pytest-xdist's `--dist loadgroup`: with pytest 9.2 it does not see its marker.)
"""

from __future__ import annotations

import functools

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

VLLM, NODES = "real vLLM", "tests/vllm/test_nodes.py"
"""Tests that start vLLM are one group, and the longest of them another one: more starts at a time would take both cores
of a small machine from all other tests."""
GROUPS = {
    "tests/cli/test_run.py::test_the_tiny_model_answers_and_can_be_stopped": VLLM,
    "tests/cli/test_run.py::test_ctrl_c_while_loading_leaves_no_process": VLLM,
    "tests/graph/test_agg_router_tiny.py": VLLM,
    "tests/graph/test_disagg_tiny.py": VLLM,
    "tests/graph/test_readme.py::test_the_first_request": VLLM,
    "tests/graph/test_readme.py::test_the_openai_client": VLLM,
    "tests/graph/test_tiny.py": VLLM,
    "tests/vllm/test_kv_events.py": VLLM,
    "tests/vllm/test_kv_path.py": VLLM,
    "tests/vllm/test_kv_transfer.py": VLLM,
    "tests/vllm/test_mock_parity.py": VLLM,
    "tests/vllm/test_old_flags.py": VLLM,
    "tests/vllm/test_tiny_model.py": VLLM,
    "tests/deploy/test_dashboards.py": "busy graph",
    "tests/deploy/test_prometheus.py": "busy graph",
}
"""the group of a file or test; others are groups by file"""
LONGEST_FIRST = (VLLM, NODES, "tests/graph/test_two_hosts.py", "busy graph")
"""then folder by folder, so that the short tests of the last ones fill the end"""
FOLDERS = ("graph", "contract", "compat", "cli", "benchmarks", "container", "deploy", "typing", "unit")


@functools.cache
def group_of(test: str) -> str:
    file = test.partition("::")[0]
    return GROUPS.get(test.partition("[")[0]) or GROUPS.get(file) or file


@functools.cache
def rank(group: str) -> int:
    """Return the place of a group's start among the others."""
    if group in LONGEST_FIRST:
        return LONGEST_FIRST.index(group)
    return len(LONGEST_FIRST) + FOLDERS.index(group.split("/")[1])


def arrange(items: list[pytest.Item]) -> None:
    """Put tests in the order in which their groups start. Raises UsageError for a test of vLLM outside its group."""
    for item in items:
        if item.get_closest_marker("vllm") and group_of(item.nodeid) not in (VLLM, NODES):
            raise pytest.UsageError(f"{item.nodeid} has the marker vllm: add it to GROUPS of tests/parallel.py")
    items.sort(key=lambda item: rank(group_of(item.nodeid)))


class Groups(LoadScopeScheduling):
    """Gives each worker a group after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

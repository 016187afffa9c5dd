"""How `pytest -n` divides the tests: files stay together, files that share a graph or an engine too, the longest first.

The graphs and servers that tests share are fixtures, so each xdist worker has its own: a group runs on one worker.
(Not pytest-xdist's `--dist loadgroup`: with pytest 9.2 it does not see its marker.)
"""

from __future__ import annotations

import functools

from xdist.scheduler.loadscope import LoadScopeScheduling

GROUPS = {
    "tests/deploy/test_dashboards.py": "busy graph",
    "tests/deploy/test_prometheus.py": "busy graph",
    "tests/graph/test_readme.py::test_the_first_request": "tiny graph",
    "tests/graph/test_readme.py::test_the_openai_client": "tiny graph",
    "tests/graph/test_tiny.py": "tiny graph",
    "tests/vllm/test_kv_events.py": "fork server",
    "tests/vllm/test_kv_transfer.py": "fork server",
    "tests/vllm/test_mock_parity.py": "fork server",
    "tests/vllm/test_tiny_model.py": "fork server",
}
"""the group of a file or test; others are groups by file"""
LONGEST_FIRST = (
    "tests/vllm/test_nodes.py",
    "tests/graph/test_two_hosts.py",
    "fork server",
    "busy graph",
    "tiny graph",
)
"""then folder by folder, so that the short tests of the last ones fill the end"""
FOLDERS = ("vllm", "graph", "deploy", "cli", "compat", "benchmarks", "container", "contract", "typing", "unit")


@functools.cache
def group_of(test: str) -> str:
    file = test.partition("::")[0]
    return GROUPS.get(test) or GROUPS.get(file) or file


@functools.cache
def rank(group: str) -> int:
    """Return the place of a group's start among the others."""
    if group in LONGEST_FIRST:
        return LONGEST_FIRST.index(group)
    return len(LONGEST_FIRST) + FOLDERS.index(group.split("/")[1])


class Groups(LoadScopeScheduling):
    """Gives each worker a group after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

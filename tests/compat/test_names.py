"""A graph with the names and habits of 0.1 and 0.2 that did not run here at first, under `dynamo serve`."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx
import pytest

from tests.served import ROOT, Served, Start

WARNINGS = (
    "@service: 'traffic' has no effect",
    "@service: 'dependencies' has no effect",
    "@service: 'http_exposed' has no effect",
    "@api: 'timeout' has no effect",
)


@pytest.fixture(scope="module")
def names_02(era: Start) -> Served:
    return era("names_02").ready()


def post(served: Served, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{served.url}/{path}", json=body, timeout=10)


def test_it_answers(names_02: Served) -> None:
    answers = {post(names_02, "generate", text="hello").text for _ in range(4)}
    assert answers == {"mixed hello 1 True", "mixed hello 2 True"}


def test_its_log_lines_keep_their_process(names_02: Served) -> None:
    """`configure_server_logging(service_name=...)` in a constructor does not take the worker's number away."""
    for number in (1, 2):
        names_02.wait_for(re.compile(rf"Backend:{number}.*hook of worker {number}"), 10)


def test_a_dependency_can_be_inspected(names_02: Served) -> None:
    found = post(names_02, "introspect").json()
    assert "cannot pickle <stub of Backend" in found.pop("pickled")
    assert found == {"vars": {}, "dict": {}, "copied": True, "members": False, "length": False}


def test_each_argument_without_effect_is_one_line(names_02: Served) -> None:
    """The command prints them, and none of its three processes does."""
    lines = [line.partition(";")[0] for line in names_02.output.splitlines() if "no effect" in line]
    assert sorted(lines) == sorted(f"warning: {text}" for text in WARNINGS)


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_dry_run_prints_them_too(jsonl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if jsonl:
        monkeypatch.setenv("DYN_LOGGING_JSONL", "1")
    command = [sys.executable, "-m", "dynamo", "serve", "tests.compat.graphs.names_02:Frontend", "--dry-run"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for text in WARNINGS:
        (line,) = [line for line in run.stderr.splitlines() if text in line]
        assert ('"level":"WARNING"' in line) is jsonl


KV_ROUTER = """
from components.frontend import Frontend
from components.kv_router import Router
from components.processor import Processor
from components.worker import VllmWorker

Frontend.link(Processor).link(Router).link(VllmWorker)
"""


def test_components_kv_router_is_the_router(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("kv")
    (folder / "agg_kv.py").write_text(KV_ROUTER)
    command = [sys.executable, "-m", "dynamo", "serve", "agg_kv:Frontend", "--working-dir", str(folder)]
    command += ["-f", "configs/agg_router.yaml", "--dry-run"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"--service-name (\w+)", run.stderr) == ["VllmWorker", "Router", "Processor", "Frontend"]

"""`dynamo llmctl`: names of models in etcd, which the Frontend serves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.cli.conftest import Graph
from tests.cli.terminal import ROOT, command, environment

CHAT = "dynamo.Processor.chat/completions"


def llmctl(graph: Graph, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command("llmctl", *arguments, **graph.env)


def served(graph: Graph) -> set[str]:
    with urllib.request.urlopen(f"{graph.url}/v1/models", timeout=10) as response:
        return {model["id"] for model in json.load(response)["data"]}


def wait_until_served(graph: Graph, name: str, wanted: bool) -> None:
    deadline = time.monotonic() + 5
    while (name in served(graph)) != wanted:
        assert time.monotonic() < deadline, served(graph)
        time.sleep(0.05)


def test_a_model_is_added_listed_served_and_removed(graph: Graph):
    added = llmctl(graph, "http", "add", "chat-models", "helper", CHAT)
    assert (added.returncode, added.stdout, added.stderr) == (0, "", "")
    wait_until_served(graph, "helper", True)
    assert command("run", "--url", graph.url, "--model", "helper", "--max-tokens", "2", "hi").returncode == 0
    twice = llmctl(graph, "http", "add", "chat", "helper", CHAT)
    assert twice.returncode == 1
    assert twice.stderr.startswith("error: failed to create key: ")
    listed = llmctl(graph, "http", "list")
    assert listed.stdout.splitlines() == [
        "+------------+-------------+-----------+------------+------------------+",
        "| MODEL TYPE | MODEL NAME  | NAMESPACE | COMPONENT  | ENDPOINT         |",
        "+------------+-------------+-----------+------------+------------------+",
        "| chat       | dynamo-tiny | dynamo    | VllmWorker | generate         |",
        "| chat       | helper      | dynamo    | Processor  | chat/completions |",
        "| completion | dynamo-tiny | dynamo    | VllmWorker | generate         |",
        "+------------+-------------+-----------+------------+------------------+",
    ]
    assert llmctl(graph, "http", "add", "completions", "helper", CHAT).returncode == 0
    assert "| completion | helper " in llmctl(graph, "http", "list", "completion").stdout
    assert "helper" in command("status", **graph.env).stdout
    for kind in ("chat-model", "completion-model"):
        removed = llmctl(graph, "http", "remove", kind, "helper")
        assert (removed.returncode, removed.stdout, removed.stderr) == (0, "", "")
    wait_until_served(graph, "helper", False)


def test_removing_a_name_without_an_entry_is_silent(graph: Graph):
    removed = llmctl(graph, "http", "remove", "chat", "no-such-model")
    assert (removed.returncode, removed.stdout, removed.stderr) == (0, "", "")
    kept = llmctl(graph, "http", "remove", "chat", "dynamo-tiny")
    assert kept.returncode == 0
    assert kept.stderr.startswith("note: running workers serve 'dynamo-tiny' by themselves")
    assert "dynamo-tiny" in served(graph)


def test_an_endpoint_without_instances_is_noted(graph: Graph):
    added = llmctl(graph, "-n", "elsewhere", "http", "add", "embedding", "vectors", "Embedder.embed")
    assert added.returncode == 0
    assert added.stderr == "note: nothing serves elsewhere.Embedder.embed now\n"
    assert llmctl(graph, "-n", "elsewhere", "http", "list").stdout.count("\n") == 5
    assert llmctl(graph, "http", "remove", "embedding", "vectors").returncode == 0
    nothing = llmctl(graph, "-n", "elsewhere", "http", "list")
    assert (nothing.returncode, nothing.stdout) == (0, "No models found in namespace: elsewhere\n")


FORM = "Format should be 'component.endpoint' or 'namespace.component.endpoint'"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["add", "chat", "x", "nodots"], 1, f"Endpoint name 'nodots' is too short. {FORM}"),
        (["add", "chat", "x", "a.b.c.d"], 1, f"Endpoint name 'a.b.c.d' is too long. {FORM}"),
        (["add", "chat", "x", "a..c"], 1, f"Endpoint name 'a..c' has an empty part. {FORM}"),
        (["add", "pictures", "x", "a.b"], 2, "Invalid value for 'TYPE'"),
        (["add", "chat", "x"], 2, "Missing argument 'ENDPOINT'"),
        (["list"], 1, "etcd does not answer at "),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments, code, message, nothing_runs):
    result = command("llmctl", "http", *arguments, **nothing_runs)
    assert (result.returncode, result.stdout) == (code, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")


def test_llmctl_is_a_command_of_its_own(graph: Graph):
    for arguments, code in ((("http", "list"), 0), (("http", "nonsense"), 2)):
        result = subprocess.run(
            [sys.executable, "-c", "import sys; from dynamo.cli.llmctl import main; sys.exit(main())", *arguments],
            cwd=ROOT,
            env=environment(**graph.env),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == code
        assert ("MODEL TYPE" in result.stdout) == (code == 0)
        assert ("run `llmctl http --help`" in result.stderr) == (code == 2)

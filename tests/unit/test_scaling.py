"""The plan of one more worker beside those that run: its number, its name, its GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dynamo.errors import ConfigError
from dynamo.launcher.managed_process import ProcessSpec
from dynamo.launcher.plan import gpus_of, plan, plan_another
from dynamo.sdk.graph import Graph, load

ROOT = Path(__file__).parents[2]
SIX = ["0", "1", "2", "3", "4", "5"]


@pytest.fixture
def graph() -> Graph:
    return load("graphs.disagg:Frontend", ROOT)


class Host:
    """A host with GPUs, the processes of a graph, and more of them."""

    def __init__(self, graph: Graph, visible: Sequence[str], **services: dict[str, Any]) -> None:
        self.graph = graph
        self.visible = visible
        self.services = {name: {"ServiceArgs": arguments} for name, arguments in services.items()}
        self.running = plan(graph, self.services, working_dir=ROOT, visible_gpus=visible)

    def add(self, service: str) -> ProcessSpec:
        more = plan_another(
            self.graph, self.services, service, self.running, working_dir=ROOT, visible_gpus=self.visible
        )
        self.running.append(more)
        return more

    def remove(self, name: str) -> None:
        self.running = [process for process in self.running if process.name != name]


def args(workers: int, gpu: float) -> dict[str, Any]:
    return {"workers": workers, "resources": {"gpu": gpu}}


def test_the_gpus_of_a_new_worker_are_free(graph: Graph) -> None:
    host = Host(graph, SIX, VllmWorker=args(1, 2), PrefillWorker=args(2, 1))
    added = host.add("VllmWorker")
    assert gpus_of(added) == ["4", "5"]
    with pytest.raises(ConfigError, match="no GPU for one more PrefillWorker: it needs 1 GPU, 0 of 6 are free"):
        host.add("PrefillWorker")
    host.remove("PrefillWorker:1")
    assert gpus_of(host.add("PrefillWorker")) == ["0"]
    with pytest.raises(ConfigError, match="it needs 2 GPUs, 0 of 6 are free"):
        host.add("VllmWorker")


def test_fractions_share_a_gpu(graph: Graph) -> None:
    host = Host(graph, ["a", "b"], VllmWorker=args(1, 0.5), PrefillWorker=args(1, 0.25))
    assert [gpus_of(p) for p in host.running if "Worker" in p.service] == [["a"], ["a"]]
    assert gpus_of(host.add("PrefillWorker")) == ["a"]
    assert gpus_of(host.add("VllmWorker")) == ["b"]
    added = host.add("VllmWorker")
    assert gpus_of(added) == ["b"]
    assert added.env["DYNAMO_GPU_SHARE"] == "0.5"
    with pytest.raises(ConfigError, match=r"it needs 0.25 GPU, 0 of 2 are free"):
        host.add("PrefillWorker")


def test_a_third_of_a_gpu_is_free_again(graph: Graph) -> None:
    host = Host(graph, ["0"], VllmWorker=args(1, 0), PrefillWorker=args(3, 1 / 3))
    for number in (1, 2, 3):
        host.remove(f"PrefillWorker:{number}")
        assert gpus_of(host.add("PrefillWorker")) == ["0"]


def test_parts_that_make_a_whole(graph: Graph) -> None:
    host = Host(graph, ["0"], VllmWorker=args(1, 2 / 3), PrefillWorker=args(1, 1 / 3))
    host.remove("PrefillWorker")
    assert gpus_of(host.add("PrefillWorker")) == ["0"]


def test_without_gpus(graph: Graph) -> None:
    host = Host(graph, [], VllmWorker=args(1, 0), PrefillWorker=args(1, 0))
    added = host.add("VllmWorker")
    assert added.env["CUDA_VISIBLE_DEVICES"] == ""


def test_number_and_name(graph: Graph) -> None:
    host = Host(graph, [], VllmWorker=args(1, 0), PrefillWorker=args(3, 0))
    assert [process.name for process in host.running][:4] == [
        "PrefillWorker:1", "PrefillWorker:2", "PrefillWorker:3", "VllmWorker"
    ]  # fmt: skip
    added = host.add("VllmWorker")
    assert (added.name, added.worker_id) == ("VllmWorker:2", 2)
    assert added.argv[-4:] == ("--worker-id", "2", "--workers", "2")
    host.remove("PrefillWorker:2")
    assert host.add("PrefillWorker").name == "PrefillWorker:2"  # the lowest number that is free
    host.remove("VllmWorker")
    assert host.add("VllmWorker").name == "VllmWorker:1"  # never the name of one that runs
    first, second = (p for p in host.running if p.service == "VllmWorker")
    assert first.env == second.env
    assert (first.cwd, first.namespace) == (second.cwd, second.namespace)

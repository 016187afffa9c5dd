"""A Router of 0.3 over the shipped VllmWorker: it finds the workers' blocks and load, after restarts of both sides too."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.served import Served, Start, until

BLOCK = 32
ONE, OTHER = list(range(1000, 1000 + 4 * BLOCK)), list(range(5000, 5000 + 4 * BLOCK))


@pytest.fixture(scope="module")
def graph(era: Start) -> Served:
    return era("own_router_03").ready()


def look(graph: Served, tokens: list[int]) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{graph.url}/look", json={"tokens": tokens}, timeout=10).json()
    return answer


def send(graph: Served, tokens: list[int], worker: int) -> None:
    answer = httpx.post(f"{graph.url}/send", json={"tokens": tokens, "worker": worker}, timeout=10)
    assert answer.status_code == 200, answer.text


def scores(graph: Served, tokens: list[int], expected: dict[int, int]) -> Callable[[], bool]:
    def same() -> bool:
        found = look(graph, tokens)
        assert found["same"], found
        return bool(found["scores"] == {str(worker): score for worker, score in expected.items()})

    return same


def test_blocks_and_load_of_each_worker(graph: Served) -> None:
    first, second = look(graph, ONE)["workers"]
    assert look(graph, ONE)["scores"] == {}
    send(graph, ONE, first)
    send(graph, ONE[: 2 * BLOCK], second)
    send(graph, OTHER, second)
    until(scores(graph, ONE, {first: 4, second: 2}), "blocks of the first prompt")
    until(scores(graph, OTHER, {second: 4}), "blocks of the second prompt")
    idle = [0, 64, 256]
    until(lambda: look(graph, ONE)["load"] == {str(first): idle, str(second): idle}, "load of both workers")


def test_evicted_blocks_are_forgotten(graph: Served) -> None:
    _, second = look(graph, ONE)["workers"]
    until(lambda: str(second) in look(graph, OTHER)["scores"], "blocks of the second prompt")
    for start in range(0, 20_000, 2_000):
        send(graph, list(range(10_000 + start, 10_000 + start + 16 * BLOCK)), second)
    until(lambda: str(second) not in look(graph, OTHER)["scores"], "eviction of the second prompt")


def test_a_new_router_sees_the_blocks(graph: Served) -> None:
    first, _ = look(graph, ONE)["workers"]
    until(lambda: look(graph, ONE)["scores"].get(str(first)) == 4, "blocks of the first prompt")
    (router,) = graph.pids("--service-name Router")
    os.kill(router, signal.SIGKILL)

    def found() -> bool:
        answer = httpx.post(f"{graph.url}/look", json={"tokens": ONE}, timeout=10)
        return answer.status_code == 200 and answer.json()["scores"].get(str(first)) == 4

    until(found, "blocks of the first prompt in the new Router")


def test_a_dead_worker_is_forgotten(graph: Served) -> None:
    first, _ = look(graph, ONE)["workers"]
    send(graph, ONE, first)
    until(lambda: look(graph, ONE)["scores"].get(str(first)) == 4, "blocks of the first prompt")
    for worker in graph.pids("--service-name VllmWorker"):
        os.kill(worker, signal.SIGKILL)

    def replaced() -> bool:
        found = look(graph, ONE)
        return len(found["workers"]) == 2 and first not in found["workers"] and found["scores"] == {}

    until(replaced, "two new workers", timeout_s=40)
    first, _ = look(graph, ONE)["workers"]
    send(graph, ONE, first)
    until(scores(graph, ONE, {first: 4}), "blocks of a new worker")
    until(lambda: look(graph, ONE)["load"].keys() == {str(w) for w in look(graph, ONE)["workers"]}, "the new load")

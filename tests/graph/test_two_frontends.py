"""Two Frontends share a port: one that is killed takes its own connections with it, and nothing else."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

import httpx
import pytest

from tests.served import Served, Start

BODY = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}


@pytest.fixture(scope="module")
def served(serve_graph: Start) -> Served:
    return serve_graph("-f", "configs/agg_mock.yaml", "--Frontend.ServiceArgs.workers=2").ready()


def frontends(served: Served) -> list[int]:
    return sorted(served.pids("--service-name Frontend"))


class Load:
    """New connections, one request each, from several threads. `outcomes`: statuses, and kinds of broken connections."""

    def __init__(self, served: Served, model: str) -> None:
        self._url, self._body = f"{served.url}/v1/chat/completions", {**BODY, "model": model}
        self._over, self._lock = threading.Event(), threading.Lock()
        self.outcomes: Counter[int | str] = Counter()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def _ask(self) -> None:
        while not self._over.is_set():
            try:
                outcome: int | str = httpx.post(self._url, json=self._body, timeout=30).status_code
            except httpx.TransportError as error:
                outcome = type(error).__name__
            with self._lock:
                self.outcomes[outcome] += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        """So many answers more."""
        ticks, wanted = threading.Event(), self.outcomes[200] + count
        for _ in range(600):
            if self.outcomes[200] >= wanted:
                return
            ticks.wait(0.05)
        raise AssertionError(self.outcomes)


def test_both_take_connections_and_count_for_themselves(served: Served) -> None:
    model = httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"]
    with Load(served, model) as load:
        load.wait_for(40)
    assert load.outcomes.keys() == {200}
    text = httpx.get(f"{served.url}/metrics").text
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert [sample for sample, times in Counter(samples).items() if times > 1] == []
    mine = [line for line in text.splitlines() if line.startswith("dynamo_frontend_requests_total{") and model in line]
    assert sum(float(line.rpartition(" ")[2]) for line in mine if 'status="success"' in line) >= 40
    assert len({part for line in mine for part in line.split(",") if part.startswith("worker_id=")}) == 2


def test_the_death_of_one_is_a_broken_connection_at_the_most(served: Served) -> None:
    model = httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"]
    before = frontends(served)
    assert len(before) == 2
    with Load(served, model) as load:
        load.wait_for(20)
        os.kill(before[0], signal.SIGKILL)
        load.wait_for(40)
        served.wait_for("Frontend:1 ready again", 30)
        load.wait_for(20)
    broken = sum(times for outcome, times in load.outcomes.items() if outcome != 200)
    assert {outcome for outcome in load.outcomes if isinstance(outcome, int)} == {200}
    assert broken <= 8, load.outcomes  # what the dead one had: one request a thread, and perhaps one in its queue
    assert set(frontends(served)) & set(before) == {before[1]}

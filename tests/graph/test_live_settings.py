"""Settings changed while a graph runs, by `dynamo set` and by hand; killed processes come back with them."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest

from dynamo.transport.etcd import Etcd
from tests.cli.terminal import command
from tests.served import Served, Start


def ask(served: Served) -> list[str]:
    """What each process of Voice has."""
    answer: list[str] = httpx.post(f"{served.url}/ask", json={}, timeout=10).json()
    return answer


@pytest.fixture(scope="module")
def served(serve_graph: Start) -> Served:
    return serve_graph("--Voice.max-words=4", graph="tests.graph.tuned:Front").ready()


@pytest.fixture
def env(served: Served) -> dict[str, str]:
    return served.servers


def test_dynamo_set(served: Served, env: dict[str, str]) -> None:
    assert ask(served) == ["quiet 4"] * 2
    result = command("set", "Voice.mode=loud", "Voice.max-words=9", **env)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "Voice.mode: quiet -> loud (2 processes)\nVoice.max-words: 4 -> 9 (2 processes)\n"
    assert ask(served) == ["loud 9"] * 2
    assert "[Voice:1] mode: quiet -> loud (etcd)" in served.output
    assert "tuned.Voice.mode: quiet -> loud" in command("status", **env).stdout.splitlines()
    before = len(served.output)
    os.kill(served.pids("--worker-id 2")[0], signal.SIGKILL)
    served.wait_for("Voice:2 ready again", 20, after=before)
    deadline = time.monotonic() + 5
    while ask(served) != ["loud 9"] * 2:  # Front may not have found it yet; a wrong value would stay
        assert time.monotonic() < deadline, ask(served)
        time.sleep(0.05)
    assert command("set", "--unset", "Voice.mode", "Voice.max-words", **env).returncode == 0
    assert ask(served) == ["quiet 4"] * 2
    assert "->" not in command("status", **env).stdout


async def test_etcd_by_hand(served: Served, env: dict[str, str]) -> None:
    async with Etcd.connect(env["ETCD_ENDPOINTS"]) as etcd:
        await etcd.put("/tuned/voice/mode", b"shrill")
        for number in (1, 2):
            served.wait_for(f'[Voice:{number}] Voice.mode: expected one of loud, quiet, found "shrill"', 5)
        assert ask(served) == ["quiet 4"] * 2
        before = time.monotonic()
        while 'tuned.Voice.mode: expected one of loud, quiet, found "shrill"; keeping quiet' not in (
            command("status", **env).stdout.splitlines()
        ):
            assert time.monotonic() - before < 30
        await etcd.put("/tuned/voice/mode", b'"loud"')
        while ask(served) != ["loud 4"] * 2:
            assert time.monotonic() - before < 40
        await etcd.delete("/tuned/voice/mode")
        while ask(served) != ["quiet 4"] * 2:
            assert time.monotonic() - before < 50


def test_calls_in_flight(served: Served) -> None:
    assert httpx.post(f"{served.url}/busy", json={}, timeout=10).json() == [[0, 1], [0, 0]]

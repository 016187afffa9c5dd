"""Signal handlers that services install for themselves run, and the graph drains all the same."""

from __future__ import annotations

import os
import signal

import httpx
import pytest

from tests.served import Start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_they_run_and_streams_finish(era: Start, number: signal.Signals) -> None:
    served = era("signals_03").ready()
    with httpx.stream("POST", f"{served.url}/generate", json={"text": "t"}, timeout=30) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        served.process.send_signal(number)
        text += "".join(pieces)
    assert text == "".join(f"t{index} " for index in range(10))
    assert served.process.wait(30) == 0
    for line in ("Frontend cleans up", "Slow cleans up"):
        assert served.output.count(line) == 1
    assert "Traceback" not in served.output


def test_one_process_alone(era: Start) -> None:
    """A second signal does not run a handler again."""
    served = era("signals_03").ready()
    for pid in served.pids("--service-name Slow"):
        os.kill(pid, signal.SIGTERM)
    served.wait_for("Slow cleans up", 20)
    served.wait_for("Slow ready again", 30, after=served.output.index("Slow cleans up"))
    assert httpx.post(f"{served.url}/generate", json={"text": "x"}, timeout=30).text.startswith("x0 x1 ")
    assert "Traceback" not in served.output
    served.stop()

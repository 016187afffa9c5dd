"""What `dynamo serve` writes: a line for each request, the same id in every process, nothing but JSON where that is asked."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.served import Served, Start

MOCK = ("-f", "configs/agg_mock.yaml")
READY = re.compile(r'"message":"ready in [^"]*http')
SECRET = "xylophone"
NOISY = """
import os
from dynamo.sdk import api, async_on_start, service

@service
class Noisy:
    @async_on_start
    async def start(self) -> None:
        print("plain words")
        print('{"half": NaN}')
        print('{"event": "of its own"}')
        os.write(1, b"\\xff\\x1b[31mred\\n")

    @api
    async def fail(self, text: str) -> str:
        raise ValueError(text)
"""


def lines(served: Served) -> list[dict[str, Any]]:
    """The output as a collector reads it: an object a line, each with what every one must have."""
    found = [json.loads(line, parse_constant=pytest.fail) for line in served.output.splitlines()]
    assert all({"time", "level", "target", "service", "message"} <= line.keys() for line in found)
    return found


def of(served: Served, name: str, request: str) -> list[str]:
    return [line["message"] for line in lines(served) if (line["service"], line.get("request_id")) == (name, request)]


def complete(served: Served, name: str, **fields: object) -> httpx.Response:
    body = {"model": "dynamo-tiny", "prompt": f"{SECRET} story", "max_tokens": 8, "ignore_eos": True, **fields}
    return httpx.post(f"{served.url}/v1/completions", json=body, headers={"x-request-id": name}, timeout=30)


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_LOGGING_JSONL", "true")
    monkeypatch.setenv("DYN_LOG", "debug")


@pytest.mark.usefixtures("as_json")
def test_every_line_is_json_and_the_id_is_in_every_process(serve_graph: Start) -> None:
    served = serve_graph(*MOCK, "--VllmWorker.ServiceArgs.workers=2")
    served.wait_for(READY, 60)
    complete(served, "one").raise_for_status()
    assert complete(served, "two", model="gpt-x").status_code == 404
    body = {"model": "dynamo-tiny", "prompt": SECRET, "max_tokens": 300, "ignore_eos": True, "stream": True}
    url, headers = f"{served.url}/v1/completions", {"x-request-id": "three"}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=30) as response:
        chunks = response.iter_lines()
        next(chunks)
        os.kill(served.pids("--service-name VllmWorker")[0], signal.SIGKILL)
        assert [line for line in chunks if line][-1] == "data: [DONE]"
    served.wait_for("ready again", 30)
    assert served.stop() == 0
    (one,) = [
        line for line in lines(served) if line["target"] == "dynamo.http.access_log" and line["request_id"] == "one"
    ]
    expected = {
        "level": "INFO", "service": "Frontend", "endpoint": "completions", "model": "dynamo-tiny", "stream": False,
        "outcome": "success", "status": 200, "cached_tokens": 0, "output_tokens": 8,
    }  # fmt: skip
    assert expected.items() <= one.items()
    assert one["prompt_tokens"] > 0
    assert one["duration_s"] > 0
    assert len(of(served, "Processor", "one")) == 1
    assert len(of(served, "VllmWorker:1", "one") + of(served, "VllmWorker:2", "one")) == 1
    assert [text[:17] for text in of(served, "Frontend", "two")] == ["completions: 404 "]
    (three,) = of(served, "Frontend", "three")
    assert "completions dynamo-tiny stream: 200 in " in three
    restarted = [line for line in lines(served) if "died (SIGKILL)" in line["message"]]
    assert [(line["level"], line["service"]) for line in restarted] == [("WARNING", "serve")]
    lost = restarted[0]["process"]
    survivor = {"VllmWorker:1": "VllmWorker:2", "VllmWorker:2": "VllmWorker:1"}[lost]
    assert any("generate ended in" in text for text in of(served, survivor, "three"))
    assert SECRET not in served.output


@pytest.mark.usefixtures("as_json")
def test_the_id_reaches_a_prefill_worker(serve_graph: Start) -> None:
    one = [f"--{name}.ServiceArgs.workers=1" for name in ("VllmWorker", "PrefillWorker")]
    served = serve_graph("-f", "configs/disagg_mock.yaml", *one, graph="graphs.disagg:Frontend")
    served.wait_for(READY, 60)
    complete(served, "long", prompt="story " * 2500).raise_for_status()
    assert served.stop() == 0
    for name in ("Frontend", "Processor", "VllmWorker", "PrefillWorker"):
        assert of(served, name, "long"), served.output
    offered, computed = of(served, "PrefillWorker", "long")
    assert offered.startswith("offering to prefill ")
    assert re.fullmatch(r"PrefillWorker prefill ended in \d\.\d{3} s: ok", computed)


@pytest.mark.usefixtures("as_json")
def test_what_a_service_prints_becomes_json(serve_graph: Start, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    served = serve_graph(graph="noisy.py", cwd=tmp_path)
    served.wait_for(READY, 60)
    assert httpx.post(f"{served.url}/fail", json={"text": "broken\nin two"}).status_code == 500
    assert served.stop() == 0
    printed = [line["message"] for line in lines(served) if line.get("target") == "output"]
    assert printed[:4] == ["plain words", '{"half": NaN}', "", "\ufffd\x1b[31mred"]
    assert {line["service"] for line in lines(served) if line.get("target") == "output"} == {"Noisy"}
    (event,) = [line for line in lines(served) if "event" in line]
    assert (event["event"], event["service"], event["level"]) == ("of its own", "Noisy", "INFO")
    failed = [line["exception"] for line in lines(served) if "exception" in line]
    assert any(trace.endswith("ValueError: broken\nin two") for trace in failed)


@pytest.mark.usefixtures("as_json")
@pytest.mark.parametrize(
    ("argument", "hint"), [("--VllmWorker.engin=mock", "did you mean engine?"), ("--prt", "--port")]
)
def test_an_error_of_the_command_line_is_json_too(serve_graph: Start, argument: str, hint: str) -> None:
    served = serve_graph(*MOCK, argument)
    assert served.process.wait(20) != 0
    (line,) = lines(served)
    assert line["level"] == "ERROR"
    assert hint in line["hint"] + line["message"]


def test_text_has_a_line_for_each_request_and_none_is_forged(serve_graph: Start) -> None:
    served = serve_graph(*MOCK, "--VllmWorker.mock-error-rate=1").ready()
    start = len(served.output)
    assert complete(served, "fails", max_tokens=64).status_code == 500
    forged = "\n2026-01-31T12:00:00.123Z  INFO dynamo: all is well \x1b[31m"
    assert complete(served, "abc", model=forged).status_code == 404
    assert httpx.get(f"{served.url}/v1/models/nothing%0D2026-01-31T12:00:00.123Z").status_code == 404
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: a] b\r\nconnection: close\r\n"
            b"content-length: 1\r\n\r\n{"
        )
        while raw.recv(4096):
            pass
    assert served.stop() == 0
    told = [line for line in served.output[start:].splitlines() if not line.startswith("stop")]
    found = [re.fullmatch(r"\S{24} +(\w+) (\S+): \[(\w+) (\S+)\] (.*)", line) for line in told if line[:4] != "    "]
    assert all(found), told
    shown = [(line[1], line[3], line[4], line[5]) for line in found if line and line[2] == "dynamo.http.access_log"]
    level, service, name, text = shown[0]
    assert (level, service, name) == ("WARNING", "Frontend", "fails")
    assert re.match(r"completions dynamo-tiny: 500 in [\d.]+ s, .* \(raised in VllmWorker generate\)$", text), text
    assert [line[2] for line in shown].count("abc") == 1
    assert r"\x1b[31m` does not exist." in shown[1][3]
    assert re.fullmatch("[0-9a-f]{32}", shown[3][2])
    assert len(shown) == 4
    assert "\x1b" not in served.output

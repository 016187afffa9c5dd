"""Log lines: always JSON if JSON is configured, one line for each record, and no lines forged by clients."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo import log
from dynamo.errors import EngineError, RequestError, UnavailableError
from dynamo.http import access_log
from dynamo.rpc.remote_errors import pack, unpack


class Spiteful:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def record(message: Any, *args: Any, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("dynamo.x", logging.INFO, "/a/place.py", 7, message, args, None)
    made.__dict__.update(extra)
    return made


@given(st.text(), st.text(), st.text())
def test_clients_cannot_forge_lines_of_text(source: str, message: str, name: str) -> None:
    token = log.request_id.set(name)
    try:
        first, *further = log.Formatter(source, as_json=False).format(record("%s", message)).splitlines()
    finally:
        log.request_id.reset(token)
    assert first.isprintable() or "\t" in first
    assert all(line.startswith("    ") for line in further)
    assert len(further) <= sum(part.count("\n") for part in (source, message, name))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.tuples(st.integers()), inner),
    max_leaves=8,
)


@given(values, st.text())
def test_json_is_one_valid_line_for_any_values(value: object, message: str) -> None:
    line = log.Formatter("W", as_json=True).format(record(message, thing=value, spite=Spiteful()))
    found = json.loads(line, parse_constant=pytest.fail)
    assert line.isascii()
    assert "\n" not in line
    assert found["message"] == message
    assert {
        "target": "dynamo.x",
        "level": "INFO",
        "service": "W",
        "file": "place.py",
        "line": 7,
    }.items() <= found.items()
    if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        assert found["thing"] in (value, repr(value))


def test_values_are_kept_as_they_are() -> None:
    found = json.loads(log.Formatter("W", as_json=True).format(record("x", took_s=0.25, stream=True, model=None)))
    assert (found["took_s"], found["stream"], found["model"]) == (0.25, True, None)
    assert "msecs" not in found


@pytest.mark.parametrize("as_json", [True, False])
def test_mismatched_arguments_are_shown(as_json: bool) -> None:
    line = log.Formatter("W", as_json=as_json).format(record("%d of %d", "one"))
    assert "%d of %d (arguments ('one',): " in line


def test_a_long_line_is_shortened_to_what_the_supervisor_reads() -> None:
    made = record("ü" * 100_000, other="y" * 100_000)
    made.exc_info = (ValueError, ValueError("first " + "z" * 100_000 + " last"), None)
    line = log.Formatter("W", as_json=True).format(made)
    assert len(line) < log.LINE_CHARS
    assert json.loads(line)["exception"].endswith(" last")


def test_local_time_has_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_LOG_USE_LOCAL_TZ", "true")
    monkeypatch.setenv("TZ", "UTC-05:30")
    import time

    time.tzset()
    try:
        made = record("x")
        made.created = 86400.25
        assert log.Formatter(as_json=False).format(made).startswith("1970-01-02T05:30:00.250+05:30  INFO dynamo.x: x")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_levels() -> None:
    root, named = log.parse_levels("warn, dynamo.http.access_log=off,nats=debug")
    assert (root, named["dynamo.http.access_log"] > logging.CRITICAL, named["nats"]) == (30, True, 10)
    with pytest.raises(ValueError, match="unknown level 'loud'"):
        log.parse_levels("dynamo=loud")


PROGRAM = """
import logging, multiprocessing, os, sys, threading, warnings
from dynamo import log

def child():
    import logging.config
    logging.config.dictConfig(json_config)
    logging.getLogger("vllm.core").info("not shown")
    logging.getLogger("vllm.core").warning("from the engine")

import json
json_config = json.load(open("dynamo/engines/vllm/logging.json"))
if __name__ == "__main__":
    log.configure("W:1")
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    spawned = multiprocessing.get_context("spawn").Process(target=child)
    spawned.start(); spawned.join()
    warnings.warn("an old\\nway")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start(); thread.join()
    logging.getLogger("x").debug("not shown")
    raise RuntimeError("the end")
"""


def run(program: str, tmp_path: Path, **environment: str) -> tuple[int, list[str]]:
    file = tmp_path / "program.py"
    file.write_text(program)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(file)], cwd=root, env={**environment, "PYTHONPATH": root}, capture_output=True, text=True
    )
    return done.returncode, done.stderr.splitlines()


def test_all_output_of_a_process_is_json(tmp_path: Path) -> None:
    code, lines = run(PROGRAM, tmp_path, DYN_LOGGING_JSONL="true")
    found = [json.loads(line) for line in lines]
    assert code == 1
    assert [(line["level"], line["target"], line["service"]) for line in found] == [
        ("WARNING", "vllm.core", "W:1"),
        ("WARNING", "py.warnings", "W:1"),
        ("CRITICAL", "dynamo.log", "W:1"),
        ("CRITICAL", "dynamo.log", "W:1"),
    ]
    assert "ZeroDivisionError" in found[2]["exception"]
    assert found[3]["message"] == "not handled: RuntimeError('the end')"


def test_a_wrong_level_is_an_error_with_a_hint(tmp_path: Path) -> None:
    program = "from dynamo import log\nlog.configure('W')"
    code, lines = run(program, tmp_path, DYN_LOG="loud")
    assert (code, lines[0][:41], lines[1][:5]) == (1, "error: DYN_LOG: unknown level 'loud'; lev", "hint:")
    code, (line,) = run(program, tmp_path, DYN_LOG="loud", DYN_LOGGING_JSONL="1")
    assert (code, json.loads(line)["level"], json.loads(line)["message"][:8]) == (1, "ERROR", "DYN_LOG:")


# -- the line of a request


def ended(error: Exception | None = None, **given: Any) -> access_log.CompletedRequest:
    outcome = "success" if error is None else "error"
    whole = {"endpoint": "chat_completions", "model": "m", "stream": False, "outcome": outcome, "error": error,
             "duration_s": 0.5, "ttft_s": None, "prompt_tokens": 9, "cached_tokens": 4, "output_tokens": 2}  # fmt: skip
    return access_log.CompletedRequest(**{**whole, **given})  # type: ignore[arg-type]


TOKENS = "tokens 9 in (4 cached), 2 out"


@pytest.mark.parametrize(
    ("request_", "level", "status", "text"),
    [
        (ended(), "INFO", 200, f": 200 in 0.500 s, {TOKENS}"),
        (ended(stream=True, ttft_s=0.1), "INFO", 200, f" stream: 200 in 0.500 s, first token after 0.100 s, {TOKENS}"),
        (ended(outcome="disconnect"), "INFO", None, f": disconnect in 0.500 s, {TOKENS}"),
        (ended(RequestError("too\nlong")), "INFO", 400, f": 400 in 0.500 s, {TOKENS}: too long"),
        (ended(UnavailableError("no worker")), "WARNING", 503, f": 503 in 0.500 s, {TOKENS}: no worker"),
        (ended(EngineError("dead"), stream=True), "WARNING", 500, f" stream: 500 in 0.500 s, {TOKENS}: dead"),
        (
            ended(EngineError("dead"), stream=True, ttft_s=0.1),
            "WARNING",
            200,
            f" stream: 200 in 0.500 s, first token after 0.100 s, {TOKENS}: dead",
        ),
        (ended(KeyError("x")), "ERROR", 500, f": 500 in 0.500 s, {TOKENS}: KeyError: 'x'"),
    ],
)
def test_each_outcome_has_its_line(
    request_: access_log.CompletedRequest, level: str, status: int | None, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dynamo.http.access_log"):
        access_log.log_completed(request_)
    (made,) = caplog.records
    assert (made.levelname, made.getMessage(), made.status) == (level, f"chat_completions m{text}", status)  # type: ignore[attr-defined]
    assert bool(made.exc_info) == (level == "ERROR")  # a bug keeps its traceback
    found = json.loads(log.Formatter(as_json=True).format(made))
    assert {
        "model": "m",
        "prompt_tokens": 9,
        "cached_tokens": 4,
        "output_tokens": 2,
        "duration_s": 0.5,
    }.items() <= found.items()


def test_a_bug_of_another_process_is_logged_there_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    error = unpack(pack(KeyError("x"), "VllmWorker:1 generate"))
    with caplog.at_level(logging.INFO, "dynamo.http.access_log"):
        access_log.log_completed(ended(error))
        access_log.log_rejected("GET /", error)
        access_log.log_stream_error("Api.method", error)
    assert [(made.levelname, made.exc_info) for made in caplog.records] == [("ERROR", None)] * 3
    assert all(made.getMessage().endswith("(raised in VllmWorker:1 generate)") for made in caplog.records)


def test_successful_requests_can_be_filtered_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dynamo.http.access_log"):
        access_log.log_completed(ended())
        access_log.log_rejected("completions", RequestError("no"))
        access_log.log_disconnected("completions", 0.1)
        access_log.log_completed(ended(UnavailableError("no worker")))
    assert [made.levelname for made in caplog.records] == ["WARNING"]


def test_a_rejected_request_quotes_little_of_the_client_s_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dynamo.http.access_log"):
        access_log.log_rejected("GET /" + "p" * 9999, RequestError("e" * 9999), status=405)
    (made,) = caplog.records
    assert len(made.getMessage()) < 3 * access_log.ERROR_CHARS
    assert made.status == 405  # type: ignore[attr-defined]

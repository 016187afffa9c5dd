"""`dynamo run in=... out=...` and `dynamo-run`: what they refuse, and answers in the terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.terminal import ROOT, command, environment


def with_input(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dynamo", "run", *arguments],
        cwd=ROOT,
        env=environment(DYN_TOKEN_ECHO_DELAY_MS="0"),
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["in=http", "out=sglang", "M"],
            "out=sglang: this project runs vLLM",
            "type out=vllm; or start your own worker",
        ),
        (["out=mistralrs"], "out=mistralrs: this project runs vLLM", "type out=vllm"),
        (["out=pystr:engine.py"], "out=pystr:engine.py: this project runs vLLM", "type out=vllm"),
        (["in=http", "out=vlm"], "out=vlm: no such output", "outputs: vllm, mocker, echo_core, echo_full, dyn"),
        (["in=web", "out=vllm"], "in=web: no such input", "inputs: http, text, stdin, batch:FILE, dyn://"),
        (["in=http:8000", "out=vllm"], "in=http:8000: no such input", "inputs: http, text, stdin, batch:FILE, dyn://"),
        (["in=batch", "out=vllm"], "in=batch: no file", "type in=batch:FILE"),
        (["in=none", "out=vllm", "M"], "in=none: an engine over several hosts is a graph", "see docs/deployment.md"),
        (["in=dyn://a.b.c", "out=dyn"], "in=dyn and out=dyn: nothing would answer", "type in=http out=dyn"),
        (["in=dyn://a..c", "out=echo_full"], "in=dyn://a..c: not an endpoint", "write in=dyn://namespace.component"),
        (
            ["in=http", "out=vllm", "--num-nodes", "2"],
            "--num-nodes: an engine over several hosts",
            "type `dynamo serve",
        ),
        (
            ["in=http", "out=dyn", "--context-length", "9"],
            "--context-length is a worker's",
            "give it to the command with",
        ),
        (["in=http", "out=vllm", "--request-template", "t"], "--request-template is not supported", "give the fields"),
        (["in=batch:/nowhere", "out=echo_full"], "in=batch:/nowhere: No such file", "give a file of lines"),
        (["in=stdin", "out=echo_full"], "in=stdin: the prompt is empty", "type: echo"),
    ],
)
def test_errors_are_one_line_and_a_hint(arguments, message, hint):
    result = with_input("", *arguments)
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    error, hinted = result.stderr.splitlines()
    assert error.startswith(f"error: {message}")
    assert hinted.startswith(f"hint: {hint}")


def test_usage_errors():
    result = with_input("", "in=http", "out=vllm", "M", "extra")
    assert (result.returncode, result.stdout) == (2, "")
    assert "unexpected argument 'extra'" in result.stderr
    assert with_input("", "in=http", "--no-such-flag").returncode == 2
    assert "in= is given twice" in with_input("", "in=http", "in=text").stderr


def test_standard_input_is_answered():
    answered = with_input("say this", "out=echo_full")
    assert (answered.returncode, answered.stdout) == (0, "say this\n")
    core = with_input("say this", "in=stdin", "out=echo_core", "dynamo-tiny")
    assert (core.returncode, core.stdout) == (0, "<|begin|><|user|>say this<|end|><|assistant|>\n")


def test_help():
    result = command("run", "in=http", "--help")
    assert result.returncode == 0
    assert "in=dyn://NS.COMP.EP" in result.stdout


def test_the_command_of_its_own():
    for arguments, code, text in ((["--version"], 0, "dynamo-run "), ([], 0, "Usage: dynamo-run in=INPUT")):
        result = subprocess.run(
            [sys.executable, "-m", "dynamo.cli.dynamo_run", *arguments],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (result.returncode, result.stdout[: len(text)]) == (code, text)


def test_a_prompt_with_an_equals_sign_is_a_prompt():
    answered = command("run", "--engine", "mock", "--max-tokens", "2", "what is in=http")
    assert answered.returncode == 0
    assert answered.stdout.strip()

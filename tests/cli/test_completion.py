"""Shell completion: bash runs the script as it does when Tab is pressed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.terminal import ROOT, command, environment

SCRIPT = """\
eval "$(dynamo completion bash)"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_dynamo_completion dynamo
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(*words: str, **variables: str) -> set[str]:
    """Return the completions that bash offers for the last word."""
    env = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin", **variables)
    result = subprocess.run(
        ["bash", "--norc", "-c", SCRIPT, "bash", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return set(result.stdout.split())


@pytest.mark.skipif(
    not shutil.which("bash") or not Path(sys.executable).with_name("dynamo").exists(), reason="needs bash and `dynamo`"
)
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("dynamo", "s"), {"serve", "status", "set", "scale"}),
        (("dynamo", ""), {"serve", "run", "build", "init", "status", "set", "scale", "llmctl", "env", "completion"}),
        (("dynamo", "completion", ""), {"bash", "zsh", "fish"}),
        (("dynamo", "serve", "graphs.agg:Frontend", "--inf"), {"--infra"}),
        (("dynamo", "serve", "graphs.agg:Frontend", "--infra", "e"), {"embedded", "external"}),
        (("dynamo", "serve", "graphs.agg:Frontend", "--Processor.router", "--dry"), {"--dry-run"}),
        (("dynamo", "llmctl", "http", ""), {"add", "list", "remove"}),
        (("dynamo", "run", "--engine", "m"), {"mock"}),
    ],
)
def test_bash_completes(words, offered):
    assert completed(*words) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell):
    result = command("completion", shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"_DYNAMO_COMPLETE={shell}_complete" in result.stdout
    assert str(ROOT) not in result.stdout


def test_an_unknown_shell():
    result = command("completion", "csh")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: Invalid value for 'SHELL': 'csh' is not one of 'bash', 'zsh', 'fish'.")

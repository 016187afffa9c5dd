"""The help of every command: its examples, and the time that it takes to load."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dynamo.cli.main import COMMANDS, SECTIONS
from tests.cli.terminal import COMMAND, ROOT, command, environment


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_usage_and_examples(name):
    result = command(name, "-h")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: dynamo {name} ")
    assert "\n  Example" in result.stdout


def test_help_lists_all_commands():
    shown = subprocess.run([*COMMAND, "--help"], cwd=ROOT, env=environment(), capture_output=True, check=True)
    for title, commands in SECTIONS.items():
        assert f"{title}:\n" in shown.stdout.decode()
        assert all(summary in shown.stdout.decode() for _, summary in commands.values())


def test_commands_import_nothing_slow():
    code = (
        "import sys\nfrom dynamo.cli.main import COMMANDS, group\n"
        "for name in COMMANDS: group.get_command(None, name)\n"
        "print(*(m for m in ('torch', 'vllm', 'grpc', 'nats', 'fastapi', 'uvloop', 'rich') if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"

"""The SDK's types, as mypy and pyright see them without any plugin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent
PROGRAMS = ["services.py", "mistakes.py"]


def marked(name: str) -> set[int]:
    lines = (HERE / name).read_text("utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if "# error" in line and not line.startswith('"""')}


def refused_by_mypy(cache: Path) -> dict[str, dict[int, str]]:
    files = [str(HERE / name) for name in PROGRAMS]
    run = subprocess.run(
        [BIN / "mypy", "--strict", "--show-error-codes", "--cache-dir", cache, *files],
        capture_output=True, text=True, cwd=ROOT, timeout=100,
    )  # fmt: skip
    refused: dict[str, dict[int, str]] = {name: {} for name in PROGRAMS}
    for path, line, text in re.findall(r"^(.+?):(\d+): error: (.*)$", run.stdout, re.M):
        refused.setdefault(Path(path).name, {})[int(line)] = text
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return refused


def refused_by_pyright() -> dict[str, dict[int, str]]:
    files = [str(HERE / name) for name in PROGRAMS]
    run = subprocess.run(
        [BIN / "pyright", "--outputjson", *files], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    refused: dict[str, dict[int, str]] = {name: {} for name in PROGRAMS}
    for found in json.loads(run.stdout)["generalDiagnostics"]:
        if found["severity"] == "error":
            refused.setdefault(Path(found["file"]).name, {})[found["range"]["start"]["line"] + 1] = found["message"]
    return refused


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_exactly_the_marked_lines_are_refused(checker: str, tmp_path: Path) -> None:
    refused = refused_by_mypy(tmp_path) if checker == "mypy" else refused_by_pyright()
    assert {name: set(lines) for name, lines in refused.items()} == {name: marked(name) for name in PROGRAMS}, refused

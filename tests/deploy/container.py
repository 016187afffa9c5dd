"""The compose files, and their services on this machine without containers."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVERS, METRICS = DEPLOY / "docker-compose.yml", DEPLOY / "metrics" / "docker-compose.yml"


def compose(file: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Load a compose file with its includes; variables that are not in `environment` have their defaults."""
    given = environment or {}
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: given.get(found[1], found[2]), file.read_text())
    document: dict[str, Any] = yaml.safe_load(text)
    for other in document.pop("include", ()):
        included = compose(file.parent / other, environment)
        for part in ("services", "volumes"):
            assert document[part].keys().isdisjoint(included[part])
            document[part] = included[part] | document[part]
    return document


def here(text: str, changes: Mapping[str, str]) -> str:
    """Replace paths and addresses of the container by local ones; each of `changes` must occur."""
    found: set[str] = set()

    def change(match: re.Match[str]) -> str:
        found.add(match[0])
        return changes[match[0]]

    text = re.sub("|".join(rf"{re.escape(old)}(?!\d)" for old in changes), change, text)
    assert found == changes.keys(), f"not in it: {changes.keys() - found}"
    return text


def _command(words: Sequence[str], changes: Mapping[str, str]) -> list[str]:
    return here("\0".join(words), changes).split("\0")


def healthy(command: Sequence[str]) -> bool:
    """Run a health check; Python replaces wget, which is not installed everywhere."""
    if command[0] != "wget":
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    try:
        with urlopen(command[-1], timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def running(
    service: Mapping[str, Any], changes: Mapping[str, str], check: Mapping[str, str], program: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Run a service until the end of the block, after its health check succeeds; yield the health check's command.

    `changes` are made to its command, `check` to its health check. `program`: what the image has as entry point.
    """
    health = _command(service["healthcheck"]["test"][1:], check)
    assert not healthy(health)  # nothing else answers there
    command = [*program, *_command(service["command"], changes)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 20
            while not healthy(health):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    pytest.fail(f"{command} does not become healthy: {log.read().decode(errors='replace')}")
                time.sleep(0.05)
            yield health
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

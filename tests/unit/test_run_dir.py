"""The run directories that are removed when the next graph starts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dynamo.launcher.run_dir import FILE, KEPT_S, announce, remove_abandoned


def run_dir(directory: Path, name: str = "dynamo-one", age_s: float = KEPT_S + 60) -> Path:
    """Create a run directory with a log, as a killed supervisor leaves it."""
    found = directory / name
    (found / "logs").mkdir(parents=True)
    (found / "logs" / "Frontend.log").write_text("the end")
    announce(found, "graphs.agg:Frontend", None, {}).close()
    age(found, age_s)
    return found


def age(directory: Path, age_s: float) -> None:
    then = time.time() - age_s
    for path in (*directory.rglob("*"), directory):
        os.utime(path, (then, then))


def test_old_directories_without_a_graph_are_removed(tmp_path: Path) -> None:
    old, recent = run_dir(tmp_path), run_dir(tmp_path, "dynamo-two", KEPT_S - 600)
    remove_abandoned(tmp_path)
    assert not old.exists()
    assert (recent / "logs" / "Frontend.log").exists()


def test_the_directory_of_a_running_graph_is_kept(tmp_path: Path) -> None:
    found = run_dir(tmp_path)
    with announce(found, "graphs.agg:Frontend", None, {}):
        age(found, 30 * KEPT_S)
        remove_abandoned(tmp_path)
        assert found.exists()
    age(found, 30 * KEPT_S)
    remove_abandoned(tmp_path)
    assert not found.exists()


def test_a_recently_written_log_keeps_the_directory(tmp_path: Path) -> None:
    found = run_dir(tmp_path)
    (found / "logs" / "Frontend.log").touch()
    remove_abandoned(tmp_path)
    assert found.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"run_dir": "/elsewhere"})])
def test_foreign_directories_are_kept(text: str, tmp_path: Path) -> None:
    found = run_dir(tmp_path)
    (found / FILE).write_text(text)
    link = tmp_path / "dynamo-link"
    link.symlink_to(run_dir(tmp_path, "elsewhere"))
    age(found, KEPT_S + 60)
    remove_abandoned(tmp_path)
    remove_abandoned(tmp_path / "missing")
    assert found.exists()
    assert (link / "logs").exists()

"""Which run directories are removed when the next graph starts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dynamo.launcher.run_dir import FILE, KEPT_S, announce, remove_abandoned


def run_dir(directory: Path, name: str = "dynamo-one", age_s: float = KEPT_S + 60) -> Path:
    """With a log, as its supervisor left it when it was killed."""
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


def test_old_ones_without_a_graph_go(tmp_path: Path) -> None:
    old, recent = run_dir(tmp_path), run_dir(tmp_path, "dynamo-two", KEPT_S - 600)
    remove_abandoned(tmp_path)
    assert not old.exists()
    assert (recent / "logs" / "Frontend.log").exists()


def test_one_whose_graph_lives_stays_however_old(tmp_path: Path) -> None:
    found = run_dir(tmp_path)
    with announce(found, "graphs.agg:Frontend", None, {}):
        age(found, 30 * KEPT_S)
        remove_abandoned(tmp_path)
        assert found.exists()
    age(found, 30 * KEPT_S)
    remove_abandoned(tmp_path)
    assert not found.exists()


def test_a_log_that_was_written_lately_keeps_it(tmp_path: Path) -> None:
    found = run_dir(tmp_path)
    (found / "logs" / "Frontend.log").touch()
    remove_abandoned(tmp_path)
    assert found.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"run_dir": "/elsewhere"})])
def test_what_is_not_ours_stays(text: str, tmp_path: Path) -> None:
    found = run_dir(tmp_path)
    (found / FILE).write_text(text)
    link = tmp_path / "dynamo-link"
    link.symlink_to(run_dir(tmp_path, "elsewhere"))
    age(found, KEPT_S + 60)
    remove_abandoned(tmp_path)
    remove_abandoned(tmp_path / "missing")
    assert found.exists()
    assert (link / "logs").exists()

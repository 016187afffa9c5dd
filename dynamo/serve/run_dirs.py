"""Run directories that nobody needs any more: those of graphs that ended by `kill -9`, and of starts that failed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from dynamo.serve.announcement import FILE

KEPT_S = 24 * 3600.0
"""since something was last written there: until then somebody may want the logs"""


def remove_old(directory: Path | None = None) -> None:
    """Remove those of this user in `directory`, where run directories are made, that have no living graph. Never raises."""
    for file in (directory or Path(tempfile.gettempdir())).glob(f"dynamo-*/{FILE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # gone meanwhile, or not ours
            _remove(file)


def _remove(file: Path) -> None:
    run_dir = file.parent
    if run_dir.lstat().st_uid != os.geteuid() or run_dir.is_symlink():
        return
    if max(path.lstat().st_mtime for path in (run_dir, *run_dir.rglob("*"))) > time.time() - KEPT_S:
        return
    with file.open(encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it lives
        if json.load(held)["run_dir"] == str(run_dir):
            shutil.rmtree(run_dir)

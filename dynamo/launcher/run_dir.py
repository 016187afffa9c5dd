"""`graph.json` in a graph's run directory, by which `dynamo status` and other commands of this user find the graph.

The supervisor holds a lock on the file while it lives. A file left behind by `kill -9` is therefore never taken for a
running graph's, even if its process id is in use again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

FILE = "graph.json"
KEPT_S = 24 * 3600.0
"""A run directory without a graph is kept this long after the last write, for its logs."""


class RunningGraph(NamedTuple):
    """One `dynamo serve` on this machine. `env` has NATS_SERVER and ETCD_ENDPOINTS; `started` is Unix time in seconds;
    `metrics` is the URL of its metrics port, empty if there is none. Fields that another version did not write are empty.
    """

    graph: str = ""
    pid: int = 0
    url: str = ""
    started: float = 0.0
    run_dir: str = ""
    env: Mapping[str, str] = MappingProxyType({})
    metrics: str = ""


def announce(
    run_dir: Path, spec: str, address: tuple[str, int] | None, env: Mapping[str, str], metrics: str = ""
) -> IO[str]:
    """Write the file and hold its lock until the returned file is closed."""
    file = (run_dir / FILE).open("w", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)
    found = RunningGraph(spec, os.getpid(), _url(address), time.time(), str(run_dir), env, metrics)
    json.dump(found._asdict(), file, indent=2)
    file.flush()
    return file


def _url(address: tuple[str, int] | None) -> str:
    if address is None:
        return ""
    host = "127.0.0.1" if address[0] in ("0.0.0.0", "::", "") else address[0]
    return f"http://{f'[{host}]' if ':' in host else host}:{address[1]}"


def running(directory: Path | None = None) -> list[RunningGraph]:
    """Return the running graphs of this user, oldest first. `directory` contains the run directories."""
    directory = directory or Path(tempfile.gettempdir())
    found = [_read(path) for path in directory.glob(f"dynamo-*/{FILE}")]
    return sorted((graph for graph in found if graph is not None), key=lambda graph: graph.started)


def _read(path: Path) -> RunningGraph | None:
    try:
        if path.stat().st_uid != os.geteuid():
            return None
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                given: dict[str, Any] = json.load(file)
                return RunningGraph(**{name: given[name] for name in RunningGraph._fields if name in given})
    except (OSError, ValueError, TypeError):  # removed meanwhile, or another version's
        pass
    return None


def remove_abandoned(directory: Path | None = None) -> None:
    """Remove this user's old run directories in `directory` that have no running graph. Never raises."""
    for file in (directory or Path(tempfile.gettempdir())).glob(f"dynamo-*/{FILE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # removed meanwhile, or not ours
            _remove(file)


def _remove(file: Path) -> None:
    run_dir = file.parent
    if run_dir.lstat().st_uid != os.geteuid() or run_dir.is_symlink():
        return
    if max(path.lstat().st_mtime for path in (run_dir, *run_dir.rglob("*"))) > time.time() - KEPT_S:
        return
    with file.open(encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its graph is running
        if json.load(held)["run_dir"] == str(run_dir):
            shutil.rmtree(run_dir)

"""Child processes of an engine: preparing the engine core's fork, listing them, and aborting a start."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def prepare_fork() -> None:
    """Make vLLM fork the engine core, with its modules imported first; the fork dies with this process.

    Call after the configuration is created, which sets the start method to spawn.
    """
    for module in (
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.engine.core",
        "vllm.v1.executor.uniproc_executor",
        "vllm.model_executor.models.registry",
    ):
        importlib.import_module(module)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        os.register_at_fork(after_in_child=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def child_pids() -> list[int]:
    """Return the ids of this process's children: the engine core, and on GPUs its workers."""
    try:
        tasks = os.listdir("/proc/self/task")
        return [int(p) for t in tasks for p in Path(f"/proc/self/task/{t}/children").read_text().split()]
    except OSError:
        return []


def is_stopped(pid: int) -> bool:
    """Return True if a signal or a debugger has stopped the process; False if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def abort_start(reason: str) -> NoReturn:
    """Kill all children and exit with status 1: a start that waits for a lost node inside vLLM cannot be interrupted."""
    log.error("start aborted: %s", reason)
    for pid in child_pids():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    logging.shutdown()
    os._exit(1)

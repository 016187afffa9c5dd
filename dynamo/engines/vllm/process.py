"""The processes below an engine: how the engine core is forked, what runs, and the end of a start that cannot succeed."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def prepare_fork() -> None:
    """Import here what the engine core needs, so that the fork has it; tie the fork's life to this process."""
    for module in (
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.engine.core",
        "vllm.v1.executor.uniproc_executor",
        "vllm.model_executor.models.registry",
    ):
        importlib.import_module(module)
    # after the configuration is made, which sets it to spawn
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        os.register_at_fork(after_in_child=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def children() -> list[int]:
    """Processes that this one has started: the engine core, and on GPUs its workers."""
    try:
        tasks = os.listdir("/proc/self/task")
        return [int(p) for t in tasks for p in Path(f"/proc/self/task/{t}/children").read_text().split()]
    except OSError:
        return []


def stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def end(reason: str) -> None:
    """Of a start that waits, in vLLM, for a node that has gone: nothing else gets it out of there."""
    log.error("cannot start: %s", reason)
    for pid in children():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    logging.shutdown()
    os._exit(1)

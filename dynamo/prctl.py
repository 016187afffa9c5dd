"""Linux process attributes, `prctl(2)`: end with the parent, adopt orphans. No-ops on other systems.

Standard library only: the guard imports it before its fork.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded here: not between fork and exec


def die_with_parent(sig: int, parent: int | None = None) -> None:
    """Request that the kernel sends `sig` to this process when its parent dies.

    Bound to the parent's *thread* that forked: fork from the main thread. Kept across exec, not inherited by children.
    With `parent`, the pid that forked this process, the signal is sent immediately if that process has died already.
    """
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), sig)


def set_subreaper() -> None:
    """Adopt orphaned descendants of this process from now on: the kernel makes them its children."""
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

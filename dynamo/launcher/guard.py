"""The guard: a small parent process that outlives the supervisor and lets nothing below it survive.

    dynamo serve ──► guard ──fork──► supervisor ──► Frontend, Processor, VllmWorker ──► engine core ──► ...

Both the guard and the supervisor are *subreapers* (`prctl(2)`): a process whose parent died is handed to the nearest
subreaper above it and not to init, so that a daemon in its own session can still be found and killed. Whoever of the
two dies first, the other one clears up:

    supervisor ends, `kill -9` included   the guard sees it end and kills what is left below
    guard ends, `kill -9` included        the supervisor gets SIGTERM from the kernel, sees that its parent is gone,
                                          kills all that it has and exits

What remains open: `kill -9` of both in the same instant. Then the workers still die, by their own PR_SET_PDEATHSIG,
but a grandchild in a session of its own does not.

Linux only. Elsewhere the prctl helpers do nothing and `descendants` finds nothing. Standard library only, and quick to
import: the fork must happen before the first thread and before anything heavy is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 1.0  # between SIGTERM and SIGKILL for what the supervisor left behind
KILL_LIMIT_S = 10.0  # a process in an uninterruptible call (a GPU driver at work) may take long to go: then give up
CLEAR_UP_S = 1.0  # for what clears up behind dead processes, before it is killed too

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded here: not between fork and exec
_guard_pid = 0  # in the supervisor: the guard's pid


def set_subreaper() -> None:
    """From now on orphaned descendants of this process become its children."""
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(sig: int, parent: int) -> None:
    """Have the kernel send `sig` to this process when `parent`, the pid that forked it, dies.

    Bound to the parent's *thread* that forked: fork from the main thread. Not inherited by children of this process,
    kept across exec. If the parent is gone already, the signal is sent now.
    """
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), sig)


def guard_is_gone() -> bool:
    """Whether this process runs below a guard that has died; False where there never was one."""
    return _guard_pid != 0 and os.getppid() != _guard_pid


def children(pid: int) -> list[int]:
    """The direct children of `pid`, zombies included, in no order."""
    return _process_table().get(pid, [])


def descendants(*pids: int) -> list[int]:
    """All processes below these, parents before their children, zombies included. One look: the tree may change."""
    table = _process_table()
    found = [child for pid in pids for child in table.get(pid, ())]
    for child in found:  # grows while it is walked
        found.extend(table.get(child, ()))
    return found


def kill(pid: int, sig: int) -> None:
    """`os.kill` that does not mind a process that is gone or belongs to someone else."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, sig)


def kill_all(pids: Iterable[int], since_s: float) -> None:
    """SIGKILL for these processes, at `since_s` seconds into killing them: call it until none is left.

    Python's resource trackers get `CLEAR_UP_S` to remove the shared memory of the dead, as they do by themselves.
    """
    for pid in pids:
        if since_s > CLEAR_UP_S or not _is_tracker(pid):
            kill(pid, signal.SIGKILL)


def _is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as command:
        return b"multiprocessing.resource_tracker" in command.read()
    return False


def kill_tree(grace_s: float = GRACE_S) -> None:
    """End every process below this one and reap it: SIGTERM, at most `grace_s` later SIGKILL until none is left.

    Returns as soon as nothing is left. Sees processes that were orphaned only if this process is a subreaper. Reaps
    every child, so that other code of this process cannot wait for one any more.
    """
    if grace_s > 0:
        for pid in descendants(os.getpid()):
            kill(pid, signal.SIGTERM)
    term_end = time.monotonic() + grace_s
    while _reap_all() and time.monotonic() < term_end:
        time.sleep(0.01)
    started = time.monotonic()
    while _reap_all() and (since_s := time.monotonic() - started) < KILL_LIMIT_S:
        kill_all(descendants(os.getpid()), since_s)  # again and again: one may have forked since the last look
        time.sleep(0.005)


def stop_hard() -> NoReturn:
    """Kill everything below this process, without grace, and end it."""
    kill_tree(0)
    os._exit(128 + signal.SIGTERM)


def guarded(run: Callable[[], int], on_death: Callable[[str], None] | None = None) -> int:
    """Fork; run `run` in the child, the *supervisor*; return its exit code when nothing is left of it.

    Call it before any thread exists and before heavy imports. The code is what `run` returned (or raised as
    SystemExit), or 128 + n if signal n ended the supervisor; `on_death` is then called with the name of the signal, once
    nothing is left. SIGINT, SIGTERM and SIGHUP that reach this process are passed on. The supervisor is in a process
    group of its own, so that a terminal's Ctrl-C reaches it once, from here.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # else what is buffered would be written twice
    set_subreaper()
    guard_pid = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # no signal is lost between the fork and the handlers
    supervisor_pid = os.fork()
    if supervisor_pid == 0:
        _supervise(run, guard_pid)

    def forward(signum: int, _frame: FrameType | None) -> None:
        kill(supervisor_pid, signum)

    _handle_stop_signals(forward)
    _, status = os.waitpid(supervisor_pid, 0)  # a handler may run in between: the call is taken up again (PEP 475)
    _handle_stop_signals(signal.SIG_IGN)
    kill_tree()
    if os.WIFEXITED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    if on_death is not None:
        on_death(signal.Signals(number).name)
    return 128 + number


def _supervise(run: Callable[[], int], guard_pid: int) -> NoReturn:
    global _guard_pid
    _guard_pid = guard_pid
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a background group may write even under `stty tostop`
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)  # and must not read: it would be stopped by SIGTTIN
        set_subreaper()
        _handle_stop_signals(_leave)
        die_with_parent(signal.SIGTERM, guard_pid)
        code = run()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)  # JSON where log.configure has set it so
    finally:
        _handle_stop_signals(signal.SIG_IGN)
        kill_tree(0 if guard_is_gone() else GRACE_S)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # not return: the caller's frames belong to the guard


def _leave(signum: int, _frame: FrameType | None) -> None:
    """How the supervisor takes a stop signal as long as it has installed nothing better."""
    if guard_is_gone():
        stop_hard()
    raise SystemExit(128 + signum)


def _handle_stop_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for sig in _STOP_SIGNALS:
        if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(sig, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def _process_table() -> dict[int, list[int]]:
    """Parent -> children of all processes. From the stat files: /proc/*/children is not in every kernel."""
    table: dict[int, list[int]] = {}
    try:
        entries = os.listdir("/proc")
    except OSError:
        return table
    for entry in filter(str.isdigit, entries):
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat", "rb") as stat:
            parent = int(stat.read().rpartition(b")")[2].split()[1])  # after "pid (any text) state"
            table.setdefault(parent, []).append(int(entry))
    return table


def _reap_all() -> bool:
    """Reap the children that have ended; whether any child, living, is left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True

"""The guard: a small parent process that outlives the supervisor and leaves no process of the graph running.

    dynamo serve ──► guard ──fork──► supervisor ──► Frontend, Processor, VllmWorker ──► engine core ──► ...

Both the guard and the supervisor are *subreapers* (`prctl(2)`): the kernel hands a process whose parent died to the
nearest subreaper above it instead of init, so that a daemon in its own session can still be found and killed. If
either of the two dies, the other one cleans up:

    supervisor ends, `kill -9` included   the guard sees it end and kills what is left below
    guard ends, `kill -9` included        the supervisor gets SIGTERM from the kernel, sees that its parent has died,
                                          kills all its processes and exits

One case remains: `kill -9` of both at the same instant. The workers still die, by their own PR_SET_PDEATHSIG, but a
grandchild in a session of its own does not.

Linux only. Elsewhere `prctl` does nothing and `descendants` finds nothing. Standard library only, and quick to import:
the fork must happen before the first thread and before anything heavy is loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import NoReturn

from dynamo import prctl

GRACE_S = 1.0  # between SIGTERM and SIGKILL for what the supervisor left behind
KILL_LIMIT_S = 10.0  # a process in an uninterruptible system call (a GPU driver) may take long to die: then give up
CLEANUP_S = 1.0  # for the resource trackers of dead processes, before they are killed too

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_guard_pid = 0  # in the supervisor: the guard's pid


def guard_died() -> bool:
    """Return True if the guard above this process has died; False if there never was one."""
    return _guard_pid != 0 and os.getppid() != _guard_pid


def children(pid: int) -> list[int]:
    """Return the direct children of `pid`, zombies included, in no particular order."""
    return _process_table().get(pid, [])


def descendants(*pids: int) -> list[int]:
    """Return all processes below these, parents before their children, zombies included: a snapshot of the tree."""
    table = _process_table()
    found = [child for pid in pids for child in table.get(pid, ())]
    for child in found:  # the list grows during the iteration
        found.extend(table.get(child, ()))
    return found


def kill(pid: int, sig: int) -> None:
    """Send a signal, as `os.kill`; ignore a process that has ended or belongs to another user."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, sig)


def kill_all(pids: Iterable[int], elapsed_s: float) -> None:
    """Send SIGKILL to these processes; `elapsed_s` is the time since the first call. Call it until none is left.

    Python's resource trackers are spared for `CLEANUP_S`: they remove the shared memory of the dead and exit.
    """
    for pid in pids:
        if elapsed_s > CLEANUP_S or not _is_resource_tracker(pid):
            kill(pid, signal.SIGKILL)


def _is_resource_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as command:
        return b"multiprocessing.resource_tracker" in command.read()
    return False


def kill_tree(grace_s: float = GRACE_S) -> None:
    """End and reap every process below this one: SIGTERM, then SIGKILL after at most `grace_s` until none is left.

    Returns as soon as none is left. Finds orphaned descendants only if this process is a subreaper. Reaps every child,
    so that other code of this process can no longer wait for one.
    """
    if grace_s > 0:
        for pid in descendants(os.getpid()):
            kill(pid, signal.SIGTERM)
    term_end = time.monotonic() + grace_s
    while _reap_all() and time.monotonic() < term_end:
        time.sleep(0.01)
    started = time.monotonic()
    while _reap_all() and (elapsed_s := time.monotonic() - started) < KILL_LIMIT_S:
        kill_all(descendants(os.getpid()), elapsed_s)  # repeated: one may have forked since the last snapshot
        time.sleep(0.005)


def exit_hard() -> NoReturn:
    """Kill everything below this process, without grace, and end it."""
    kill_tree(0)
    os._exit(128 + signal.SIGTERM)


def guarded(run: Callable[[], int], on_death: Callable[[str], None] | None = None) -> int:
    """Fork; run `run` in the child, the *supervisor*; return its exit code once all its processes have ended.

    Call it before any thread exists and before heavy imports. The code is what `run` returned (or raised as
    SystemExit), or 128 + n if signal n ended the supervisor; `on_death` is then called with the signal's name, after
    the cleanup. SIGINT, SIGTERM and SIGHUP that reach this process are forwarded. The supervisor is in a process group
    of its own, so that a terminal's Ctrl-C reaches it once, from here.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or both processes would write what is buffered
    prctl.set_subreaper()
    guard_pid = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # no signal is lost between the fork and the handlers
    supervisor_pid = os.fork()
    if supervisor_pid == 0:
        _supervise(run, guard_pid)

    def forward(signum: int, _frame: FrameType | None) -> None:
        kill(supervisor_pid, signum)

    _handle_stop_signals(forward)
    _, status = os.waitpid(supervisor_pid, 0)  # resumed after a signal handler (PEP 475)
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
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), 0)  # and must not read: SIGTTIN would stop it
        prctl.set_subreaper()
        _handle_stop_signals(_exit_on_signal)
        prctl.die_with_parent(signal.SIGTERM, guard_pid)
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
        kill_tree(0 if guard_died() else GRACE_S)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # not return: the caller's frames belong to the guard


def _exit_on_signal(signum: int, _frame: FrameType | None) -> None:
    """Exit on a stop signal: the supervisor's handler until `Supervisor.run` installs its own."""
    if guard_died():
        exit_hard()
    raise SystemExit(128 + signum)


def _handle_stop_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for sig in _STOP_SIGNALS:
        if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN:  # keep ignoring it under nohup
            signal.signal(sig, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def _process_table() -> dict[int, list[int]]:
    """Map each parent's pid to its children's, for all processes of the machine.

    Read from the stat files: /proc/*/children does not exist in every kernel.
    """
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
    """Reap the children that have ended; return True if living ones are left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True

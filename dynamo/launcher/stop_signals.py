"""The signals that stop a graph, handled in the supervisor's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

from dynamo.launcher import guard

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals(on_stop: Callable[[int], None]) -> Iterator[None]:
    """Call `on_stop` with the number of each stop signal until the block ends, then restore the earlier handlers.

    A signal after the guard's death kills all processes and ends this one without calling `on_stop`.
    """

    def handle(signum: int) -> None:
        if guard.guard_died():
            guard.exit_hard()
        on_stop(signum)

    loop = asyncio.get_running_loop()
    before = {sig: signal.getsignal(sig) for sig in STOP_SIGNALS}
    handled = [sig for sig in before if sig != signal.SIGHUP or before[sig] != signal.SIG_IGN]  # ignored under nohup
    for sig in handled:
        loop.add_signal_handler(sig, handle, sig)
    if guard.guard_died():  # its signal came before the handlers
        guard.exit_hard()
    try:
        yield
    finally:
        for sig in handled:
            loop.remove_signal_handler(sig)
            signal.signal(sig, before[sig])
